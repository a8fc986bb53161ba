//! What an NVIDIA GPU does while steps run, from CUPTI: whichever framework launches.

use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::{Profile, readable};

/// A kernel, copy or fill on the device. Times in nanoseconds of the device's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    pub name: String,
    /// `phase;operator`; empty where the launch was not seen.
    pub launched_by: String,
    pub start: u64,
    pub end: u64,
    pub stream: u32,
}

/// A recording of some steps.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    pub activities: Vec<Activity>,
    pub steps: u64,
    /// Time of all steps on the host's clock, in nanoseconds.
    pub wall: u64,
}

impl Trace {
    /// Nanoseconds in which at least one activity ran.
    pub fn busy(&self) -> u64 {
        self.busy_with(|_| true)
    }

    /// Nanoseconds in which an exchange between ranks ran, and those of them in which nothing else did.
    pub fn exchange(&self) -> (u64, u64) {
        // NCCL's kernels, whoever calls it.
        let is = |a: &Activity| a.name.contains("ncclDevKernel");
        (self.busy_with(is), self.busy() - self.busy_with(|a| !is(a)))
    }

    fn busy_with(&self, which: impl Fn(&Activity) -> bool) -> u64 {
        let chosen = self.activities.iter().filter(|a| which(a));
        let mut spans: Vec<(u64, u64)> = chosen.map(|a| (a.start, a.end)).collect();
        spans.sort_unstable();
        let (mut busy, mut reached) = (0, 0);
        for (start, end) in spans {
            busy += end.saturating_sub(start.max(reached));
            reached = reached.max(end);
        }
        busy
    }

    /// The sum of all activities in nanoseconds: more than [`Self::busy`] where two ran at
    /// once.
    pub fn device_time(&self) -> u64 {
        self.activities.iter().map(|a| a.end - a.start).sum()
    }

    /// Share of the wall time in which the device did nothing, in 0..1.
    pub fn idle(&self) -> f64 {
        1.0 - (self.busy() as f64 / self.wall.max(1) as f64).min(1.0)
    }

    /// `root` → phase → operator → kernel, weighted with device time.
    pub fn profile(&self, root: &str) -> Profile {
        let mut profile = Profile::default();
        for activity in &self.activities {
            let mut frames = vec![root.to_owned()];
            let by = if activity.launched_by.is_empty() { "other" } else { &activity.launched_by };
            frames.extend(by.split(';').map(str::to_owned));
            frames.push(kernel_name(&activity.name));
            profile.add(&frames, activity.end - activity.start);
        }
        profile
    }

    /// In the Trace Event Format, which Perfetto and chrome://tracing open.
    pub fn events(&self) -> String {
        let origin = self.activities.iter().map(|a| a.start).min().unwrap_or(0);
        let mut text = String::from("{\"traceEvents\":[\n");
        for (index, a) in self.activities.iter().enumerate() {
            let comma = if index == 0 { "" } else { ",\n" };
            let name = serde_json::Value::from(kernel_name(&a.name));
            let by = serde_json::Value::from(a.launched_by.as_str());
            let (start, length) = ((a.start - origin) as f64 / 1e3, (a.end - a.start) as f64 / 1e3);
            let _ = write!(
                text,
                "{comma}{{\"ph\":\"X\",\"pid\":0,\"tid\":{},\"ts\":{start},\"dur\":{length},\"name\":{name},\
                 \"args\":{{\"launched by\":{by}}}}}",
                a.stream
            );
        }
        text.push_str("\n]}\n");
        text
    }
}

/// A kernel's name as a reader wants it.
fn kernel_name(mangled: &str) -> String {
    let mut name = readable(mangled);
    if name.chars().count() > 90 {
        name = name.chars().take(89).chain(['…']).collect();
    }
    name
}

/// Makes CUPTI name launches from here on, until the value goes. A graph's kernels are
/// named only if it is recorded meanwhile.
pub struct Watch(());

impl Drop for Watch {
    fn drop(&mut self) {
        native::unwatch();
    }
}

/// # Errors
/// Where there is no CUPTI, or the system keeps it from this user.
pub fn watch() -> Result<Watch> {
    native::watch().map(|()| Watch(()))
}

/// Records what the device does during `steps` calls of `step`.
pub fn record(steps: u64, mut step: impl FnMut() -> Result<()>) -> Result<Trace> {
    native::begin()?;
    let start = std::time::Instant::now();
    let done = (0..steps).try_for_each(|_| step());
    let wall = start.elapsed().as_nanos() as u64;
    let activities = native::end()?;
    done?;
    if activities.is_empty() {
        bail!("CUPTI recorded nothing: is another profiler attached?");
    }
    Ok(Trace { activities, steps, wall })
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
        fn tb_gpu_watch() -> c_int;
        fn tb_gpu_unwatch() -> c_int;
        fn tb_gpu_begin() -> c_int;
        fn tb_gpu_end(take: extern "C" fn(*mut c_void, *const Raw), to: *mut c_void) -> c_int;
    }

    fn checked(status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: a string that lives until the next failing call.
        bail!("{}", unsafe { CStr::from_ptr(tb_gpu_last_error()) }.to_string_lossy())
    }

    pub fn watch() -> Result<()> {
        // SAFETY (here and below): no pointers but those described.
        checked(unsafe { tb_gpu_watch() })
    }

    pub fn unwatch() {
        unsafe { tb_gpu_unwatch() };
    }

    pub fn begin() -> Result<()> {
        checked(unsafe { tb_gpu_begin() })
    }

    pub fn end() -> Result<Vec<Activity>> {
        extern "C" fn take(to: *mut c_void, raw: *const Raw) {
            // SAFETY: `to` is the vector below, `raw` lives during the call.
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
        checked(unsafe { tb_gpu_end(take, (&raw mut all).cast()) })?;
        Ok(all)
    }
}

#[cfg(not(cupti))]
mod native {
    use anyhow::{Result, bail};

    use super::Activity;

    pub fn watch() -> Result<()> {
        bail!("built without CUPTI's headers: run ./scripts/setup on a machine with an NVIDIA driver")
    }

    pub fn unwatch() {}

    pub fn begin() -> Result<()> {
        watch()
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
            steps: 2,
            wall: 600,
        }
    }

    #[test]
    fn overlapping_kernels_are_busy_once() {
        assert_eq!(trace().device_time(), 350);
        assert_eq!(trace().busy(), 300);
        assert!((trace().idle() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn an_exchange_is_told_from_what_runs_beside_it() {
        let mut shared = trace();
        assert_eq!(shared.exchange(), (0, 0));
        shared.activities[1].name =
            "_Z40ncclDevKernel_AllReduce_Sum_f32_RING_LL24ncclDevKernelArgs".to_owned();
        // From 150 to 300, and the other kernel until 200.
        assert_eq!(shared.exchange(), (150, 100));
    }

    #[test]
    fn kernels_hang_below_their_operators() {
        let folded = trace().profile("train-step").folded();
        assert!(folded.contains("train-step;forward;aten::gelu;at::native::gelu 100\n"), "{folded}");
        assert!(folded.contains("train-step;other;[memory set] 100\n"), "{folded}");
    }

    #[test]
    fn events_are_json() {
        let events: serde_json::Value = serde_json::from_str(&trace().events()).unwrap();
        assert_eq!(events["traceEvents"].as_array().unwrap().len(), 3);
        assert_eq!(events["traceEvents"][1]["ts"], 0.05);
    }

    #[test]
    fn without_a_gpu_there_is_a_reason() {
        match record(1, || Ok(())) {
            // Either what to do for it to be built, or CUPTI's own word.
            Err(reason) => {
                let reason = reason.to_string();
                println!("no trace of a GPU: {reason}");
                let known = ["scripts/setup", "CUPTI", "NVIDIA"].iter().any(|word| reason.contains(word));
                assert!(known, "{reason}");
            }
            Ok(trace) => panic!("an empty step left {} activities", trace.activities.len()),
        }
    }
}
