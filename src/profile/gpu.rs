//! Recordings of an NVIDIA GPU through CUPTI. They work for every framework that launches kernels.

use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::{Profile, readable_name};

/// A kernel, copy or memory set. Times are nanoseconds of the device's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    pub name: String,
    /// `phase;operator` of the launch; empty if it was not observed.
    pub launched_by: String,
    pub start: u64,
    pub end: u64,
    pub stream: u32,
}

/// A recording of steps on a GPU.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    pub activities: Vec<Activity>,
    /// Nanoseconds that all steps took by the host's clock.
    pub wall: u64,
}

impl Trace {
    /// Returns the nanoseconds in which at least one activity ran.
    pub fn busy(&self) -> u64 {
        self.busy_with(|_| true)
    }

    /// Returns the nanoseconds in which NCCL communicated, and the part of them in which nothing else ran.
    pub fn communication(&self) -> (u64, u64) {
        let communicates = |a: &Activity| a.name.contains("ncclDevKernel");
        (self.busy_with(communicates), self.busy() - self.busy_with(|a| !communicates(a)))
    }

    /// Returns the nanoseconds in which at least one activity of `kind` ran.
    fn busy_with(&self, kind: impl Fn(&Activity) -> bool) -> u64 {
        let selected = self.activities.iter().filter(|a| kind(a));
        let mut spans: Vec<(u64, u64)> = selected.map(|a| (a.start, a.end)).collect();
        spans.sort_unstable();
        let (mut busy, mut busy_until) = (0, 0);
        for (start, end) in spans {
            busy += end.saturating_sub(start.max(busy_until));
            busy_until = busy_until.max(end);
        }
        busy
    }

    /// Returns the sum of all durations in nanoseconds. It exceeds [`Self::busy`] if activities overlap.
    pub fn device_time(&self) -> u64 {
        self.activities.iter().map(|a| a.end - a.start).sum()
    }

    /// Returns the share of the wall time in which nothing ran on the device, from 0 to 1.
    pub fn idle_share(&self) -> f64 {
        1.0 - (self.busy() as f64 / self.wall.max(1) as f64).min(1.0)
    }

    /// Returns the stacks `root` → phase → operator → kernel, weighted by device time.
    pub fn profile(&self, root: &str) -> Profile {
        let mut profile = Profile::default();
        for activity in &self.activities {
            let mut frames = vec![root.to_owned()];
            let launcher = if activity.launched_by.is_empty() { "other" } else { &activity.launched_by };
            frames.extend(launcher.split(';').map(str::to_owned));
            frames.push(kernel_name(&activity.name));
            profile.add(&frames, activity.end - activity.start);
        }
        profile
    }

    /// Formats the activities in the Trace Event Format of Perfetto and chrome://tracing.
    pub fn trace_events(&self) -> String {
        let origin = self.activities.iter().map(|a| a.start).min().unwrap_or(0);
        let mut text = String::from("{\"traceEvents\":[\n");
        for (index, a) in self.activities.iter().enumerate() {
            let comma = if index == 0 { "" } else { ",\n" };
            let name = serde_json::Value::from(kernel_name(&a.name));
            let launcher = serde_json::Value::from(a.launched_by.as_str());
            let (start, length) = ((a.start - origin) as f64 / 1e3, (a.end - a.start) as f64 / 1e3);
            let _ = write!(
                text,
                "{comma}{{\"ph\":\"X\",\"pid\":0,\"tid\":{},\"ts\":{start},\"dur\":{length},\"name\":{name},\
                 \"args\":{{\"launched by\":{launcher}}}}}",
                a.stream
            );
        }
        text.push_str("\n]}\n");
        text
    }
}

/// Returns the readable name of a kernel, at most 90 characters long.
fn kernel_name(mangled: &str) -> String {
    let mut name = readable_name(mangled);
    if name.chars().count() > 90 {
        name = name.chars().take(89).chain(['…']).collect();
    }
    name
}

/// Guard during whose life CUPTI attributes launches to operators.
pub struct LaunchAttribution(());

impl Drop for LaunchAttribution {
    fn drop(&mut self) {
        native::stop_attribution();
    }
}

/// Starts to attribute launches to operators. The kernels of a CUDA graph are attributed only if the graph is
/// captured during the life of the guard.
///
/// # Errors
/// Returns an error if CUPTI is missing, or if this user may not profile.
pub fn attribute_launches() -> Result<LaunchAttribution> {
    native::start_attribution().map(|()| LaunchAttribution(()))
}

/// Records the activities of the device during `steps` calls of `step`.
///
/// # Errors
/// Returns an error if CUPTI is missing or records nothing, or if a step fails.
pub fn record(steps: u64, mut step: impl FnMut() -> Result<()>) -> Result<Trace> {
    native::begin()?;
    let start = std::time::Instant::now();
    let outcome = (0..steps).try_for_each(|_| step());
    let wall = start.elapsed().as_nanos() as u64;
    let activities = native::end()?;
    outcome?;
    if activities.is_empty() {
        bail!("CUPTI recorded nothing: is another profiler attached?");
    }
    Ok(Trace { activities, wall })
}

#[cfg(cupti)]
mod native {
    use std::ffi::{CStr, c_char, c_int, c_void};

    use anyhow::{Result, bail};

    use super::Activity;

    #[repr(C)]
    struct Raw {
        name: *const c_char,
        launched_by: *const c_char,
        start: u64,
        end: u64,
        stream: u32,
    }

    unsafe extern "C" {
        fn tb_gpu_last_error() -> *const c_char;
        fn tb_gpu_start_attribution() -> c_int;
        fn tb_gpu_stop_attribution() -> c_int;
        fn tb_gpu_begin() -> c_int;
        fn tb_gpu_end(take: extern "C" fn(*mut c_void, *const Raw), to: *mut c_void) -> c_int;
    }

    fn check_status(status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the string lives until the next call that fails.
        bail!("{}", unsafe { CStr::from_ptr(tb_gpu_last_error()) }.to_string_lossy())
    }

    pub fn start_attribution() -> Result<()> {
        // SAFETY (here and below): the functions take no pointers, except in `end`.
        check_status(unsafe { tb_gpu_start_attribution() })
    }

    pub fn stop_attribution() {
        unsafe { tb_gpu_stop_attribution() };
    }

    pub fn begin() -> Result<()> {
        check_status(unsafe { tb_gpu_begin() })
    }

    pub fn end() -> Result<Vec<Activity>> {
        extern "C" fn take(to: *mut c_void, raw: *const Raw) {
            // SAFETY: `to` is the vector below, and `raw` lives during the call.
            let (all, raw) = unsafe { (&mut *to.cast::<Vec<Activity>>(), &*raw) };
            let text = |p: *const c_char| unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned();
            all.push(Activity {
                name: text(raw.name),
                launched_by: text(raw.launched_by),
                start: raw.start,
                end: raw.end.max(raw.start),
                stream: raw.stream,
            });
        }
        let mut all: Vec<Activity> = Vec::new();
        check_status(unsafe { tb_gpu_end(take, (&raw mut all).cast()) })?;
        Ok(all)
    }
}

#[cfg(not(cupti))]
mod native {
    use anyhow::{Result, bail};

    use super::Activity;

    pub fn start_attribution() -> Result<()> {
        bail!("built without CUPTI's headers: run ./scripts/setup on a machine with an NVIDIA driver")
    }

    pub fn stop_attribution() {}

    pub fn begin() -> Result<()> {
        start_attribution()
    }

    pub fn end() -> Result<Vec<Activity>> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> Trace {
        let activity = |name: &str, by: &str, start, end| Activity {
            name: name.to_owned(),
            launched_by: by.to_owned(),
            start,
            end,
            stream: 7,
        };
        Trace {
            activities: vec![
                activity("_ZN2at6native4geluEi", "forward;aten::gelu", 100, 200),
                activity("gemm", "backward;aten::mm", 150, 300),
                activity("[memory set]", "", 400, 500),
            ],
            wall: 600,
        }
    }

    #[test]
    fn overlapping_kernels_count_once_as_busy() {
        assert_eq!(trace().device_time(), 350);
        assert_eq!(trace().busy(), 300);
        assert!((trace().idle_share() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn exposed_communication_excludes_the_overlap_with_other_kernels() {
        let mut distributed = trace();
        assert_eq!(distributed.communication(), (0, 0));
        distributed.activities[1].name =
            "_Z40ncclDevKernel_AllReduce_Sum_f32_RING_LL24ncclDevKernelArgs".to_owned();
        // It runs from 150 to 300, and the other kernel until 200.
        assert_eq!(distributed.communication(), (150, 100));
    }

    #[test]
    fn kernels_are_below_their_operators() {
        let folded = trace().profile("train-step").folded();
        assert!(folded.contains("train-step;forward;aten::gelu;at::native::gelu 100\n"), "{folded}");
        assert!(folded.contains("train-step;other;[memory set] 100\n"), "{folded}");
    }

    #[test]
    fn trace_events_are_json() {
        let events: serde_json::Value = serde_json::from_str(&trace().trace_events()).unwrap();
        assert_eq!(events["traceEvents"].as_array().unwrap().len(), 3);
        assert_eq!(events["traceEvents"][1]["ts"], 0.05);
    }

    #[test]
    fn an_empty_recording_is_an_error_with_a_reason() {
        match record(1, || Ok(())) {
            // The reason names the set-up script or comes from CUPTI.
            Err(reason) => {
                let reason = reason.to_string();
                println!("the GPU was not recorded: {reason}");
                let known = ["scripts/setup", "CUPTI", "NVIDIA"].iter().any(|word| reason.contains(word));
                assert!(known, "{reason}");
            }
            Ok(trace) => panic!("an empty step left {} activities", trace.activities.len()),
        }
    }
}
