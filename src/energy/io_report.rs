//! The energy counters of Apple silicon, from the reports of its power manager (group "Energy Model" of IOReport). They need
//! no root. IOReport has no public header, and this code was never run: it is only type-checked.

/// Returns the joules of a unit of IOReport.
fn joules_per_unit(label: &str) -> Option<f64> {
    match label.trim() {
        "mJ" => Some(1e-3),
        "uJ" | "µJ" => Some(1e-6),
        "nJ" => Some(1e-9),
        _ => None,
    }
}

/// Returns true for the counter of all cores of a kind, such as `CPU`. Chips of two dies have one for each, such as
/// `DIE_0_CPU Energy`.
fn counts(channel: &str, kind: &str) -> bool {
    channel.strip_suffix(" Energy").is_some_and(|name| name == kind || name.ends_with(&format!("_{kind}")))
}

#[cfg(target_os = "macos")]
pub use counter::open;

#[cfg(target_os = "macos")]
mod counter {
    use std::ffi::{CStr, c_char, c_int, c_void};

    use anyhow::{Context, Result, bail, ensure};

    use super::super::{Counter, Scope};
    use super::{counts, joules_per_unit};
    use crate::suite::Device;

    /// An object of Core Foundation.
    type Object = *const c_void;

    const UTF8: u32 = 0x0800_0100;

    #[link(name = "CoreFoundation", kind = "framework")]
    unsafe extern "C" {
        fn CFStringCreateWithCString(allocator: Object, text: *const c_char, encoding: u32) -> Object;
        fn CFStringGetCString(text: Object, buffer: *mut c_char, size: isize, encoding: u32) -> u8;
        fn CFDictionaryGetValue(dictionary: Object, key: Object) -> Object;
        fn CFArrayGetCount(array: Object) -> isize;
        fn CFArrayGetValueAtIndex(array: Object, index: isize) -> Object;
        fn CFRelease(object: Object);
    }

    type CopyChannels = unsafe extern "C" fn(Object, Object, u64, u64, u64) -> Object;
    type Subscribe = unsafe extern "C" fn(Object, Object, *mut Object, u64, Object) -> Object;
    type Sample = unsafe extern "C" fn(Object, Object, Object) -> Object;
    type Text = unsafe extern "C" fn(Object) -> Object;
    type Value = unsafe extern "C" fn(Object, *mut c_int) -> i64;

    /// A reference that is released when it is dropped.
    struct Owned(Object);

    impl Owned {
        fn new(object: Object, name: &str) -> Result<Self> {
            ensure!(!object.is_null(), "IOReport returns no {name}");
            Ok(Self(object))
        }

        fn text(text: &CStr) -> Result<Self> {
            // SAFETY: a NUL-terminated string.
            Self::new(unsafe { CFStringCreateWithCString(std::ptr::null(), text.as_ptr(), UTF8) }, "text")
        }
    }

    impl Drop for Owned {
        fn drop(&mut self) {
            // SAFETY: the value owns one reference.
            unsafe { CFRelease(self.0) };
        }
    }

    fn read_text(text: Object) -> String {
        let mut buffer = [0; 128];
        // SAFETY: a string or null, and a buffer of the size that is passed.
        let copied = !text.is_null()
            && unsafe { CFStringGetCString(text, buffer.as_mut_ptr(), buffer.len() as isize, UTF8) } != 0;
        if !copied {
            return String::new();
        }
        // SAFETY: a NUL-terminated string was written.
        unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned()
    }

    /// Returns a function of a library.
    ///
    /// # Safety
    /// `F` must be the type of the function.
    unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F> {
        // SAFETY: a handle of `dlopen` and a NUL-terminated name.
        let address = unsafe { libc::dlsym(library, name.as_ptr()) };
        ensure!(!address.is_null(), "IOReport has no {}", name.to_string_lossy());
        // SAFETY: the address is a function of the caller's type, which has the size of a pointer.
        Ok(unsafe { std::mem::transmute_copy(&address) })
    }

    /// A subscription to the energy counters.
    struct Subscription {
        subscription: Owned,
        channels: Owned,
        sample: Sample,
        name: Text,
        unit: Text,
        value: Value,
        /// `CPU` or `GPU`.
        kind: &'static str,
    }

    impl Subscription {
        fn new(kind: &'static str) -> Result<Self> {
            // SAFETY: loads a library of the system.
            let library = unsafe { libc::dlopen(c"/usr/lib/libIOReport.dylib".as_ptr(), libc::RTLD_NOW) };
            ensure!(!library.is_null(), "this macOS has no IOReport");
            // SAFETY: the types are those of the library's functions.
            let (copy, subscribe, sample, name, unit, value) = unsafe {
                let copy: CopyChannels = function(library, c"IOReportCopyChannelsInGroup")?;
                let subscribe: Subscribe = function(library, c"IOReportCreateSubscription")?;
                (
                    copy,
                    subscribe,
                    function::<Sample>(library, c"IOReportCreateSamples")?,
                    function::<Text>(library, c"IOReportChannelGetChannelName")?,
                    function::<Text>(library, c"IOReportChannelGetUnitLabel")?,
                    function::<Value>(library, c"IOReportSimpleGetIntegerValue")?,
                )
            };
            let (group, null) = (Owned::text(c"Energy Model")?, std::ptr::null());
            // SAFETY: live objects, and a place for a reference that this value owns.
            unsafe {
                let wanted = Owned::new(copy(group.0, null, 0, 0, 0), "energy counters")?;
                let mut subscribed: Object = null;
                let subscription = subscribe(null, wanted.0, &raw mut subscribed, 0, null);
                let subscription = Owned::new(subscription, "subscription")?;
                let channels = Owned::new(subscribed, "channels")?;
                Ok(Self { subscription, channels, sample, name, unit, value, kind })
            }
        }

        fn joules(&self) -> Result<f64> {
            // SAFETY: live objects. A sample is a dictionary whose array has the channels, which live as long as it.
            unsafe {
                let sample = (self.sample)(self.subscription.0, self.channels.0, std::ptr::null());
                let sample = Owned::new(sample, "sample")?;
                let key = Owned::text(c"IOReportChannels")?;
                let channels = CFDictionaryGetValue(sample.0, key.0);
                ensure!(!channels.is_null(), "a sample of IOReport has no channels");
                let (mut total, mut found) = (0.0, false);
                for index in 0..CFArrayGetCount(channels) {
                    let channel = CFArrayGetValueAtIndex(channels, index);
                    if counts(&read_text((self.name)(channel)), self.kind) {
                        let label = read_text((self.unit)(channel));
                        let unit =
                            joules_per_unit(&label).with_context(|| format!("unknown unit '{label}'"))?;
                        total += unit * (self.value)(channel, std::ptr::null_mut()) as f64;
                        found = true;
                    }
                }
                ensure!(found, "IOReport has no counter of the {}", self.kind);
                Ok(total)
            }
        }
    }

    /// Opens the counter of the CPU or of the GPU.
    ///
    /// # Errors
    /// Returns the reason if this Mac has none.
    pub fn open(device: Device) -> Result<Counter> {
        let kind = match device {
            Device::Cpu => "CPU",
            Device::AppleGpu => "GPU",
            Device::NvidiaGpu => bail!("CUDA does not exist on macOS"),
        };
        let subscription = Subscription::new(kind)?;
        subscription.joules()?;
        let read = move || subscription.joules();
        Ok(Counter { scope: Scope::Cores, limit_watts: None, read: Box::new(read) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sums_of_a_kind_are_counted() {
        for (channel, kind, expected) in [
            ("CPU Energy", "CPU", true),
            ("DIE_1_CPU Energy", "CPU", true),
            ("GPU Energy", "GPU", true),
            ("GPU Energy", "CPU", false),
            ("GPU SRAM Energy", "GPU", false),
            ("ECPU0", "CPU", false),
            ("DRAM", "CPU", false),
        ] {
            assert_eq!(counts(channel, kind), expected, "{channel}");
        }
        assert_eq!(joules_per_unit("nJ "), Some(1e-9));
        assert_eq!(joules_per_unit("W"), None);
    }
}
