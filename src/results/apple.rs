//! Details of a Mac that only its own commands report.

/// Returns the name of Apple's GPU with its cores, which differ within a chip. `ioreg` is the output of
/// `ioreg -rc AGXAccelerator -d1`.
pub fn gpu_name(cpu: &str, ioreg: &str) -> String {
    let cores = ioreg
        .lines()
        .find_map(|line| line.trim().strip_prefix("\"gpu-core-count\" = ")?.trim().parse::<u32>().ok());
    cores.map_or_else(|| format!("{cpu} GPU"), |cores| format!("{cpu} GPU ({cores} cores)"))
}

/// Returns the power source from the output of `pmset -g batt`.
pub fn power_source(pmset: &str) -> Option<&str> {
    // Now drawing from 'Battery Power'
    pmset.lines().next()?.split('\'').nth(1)
}

/// Returns `on`, `off` or `high power` from the output of `pmset -g`. An M1 Pro and later have the key `powermode`
/// with the values 0, 1 (low) and 2 (high), and other Macs `lowpowermode`.
pub fn low_power_mode(pmset: &str) -> Option<&'static str> {
    let value = |line: &str| {
        let (key, value) = line.trim().split_once(char::is_whitespace)?;
        matches!(key, "lowpowermode" | "powermode").then(|| value.trim().to_owned())
    };
    match pmset.lines().find_map(value)?.as_str() {
        "0" => Some("off"),
        "1" => Some("on"),
        "2" => Some("high power"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpus_of_one_chip_differ_by_their_cores() {
        let ioreg = "+-o AGXAcceleratorG15G  <class AGXAcceleratorG15G, id 0x1000004f3>\n    {\n      \"IOClass\" = \
                     \"AGXAcceleratorG15G\"\n      \"gpu-core-count\" = 10\n    }\n";
        assert_eq!(gpu_name("Apple M3", ioreg), "Apple M3 GPU (10 cores)");
        assert_eq!(gpu_name("Apple M3", ""), "Apple M3 GPU");
    }

    #[test]
    fn power_settings_are_read() {
        let battery =
            "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1234)\t80%; discharging; 3:02\n";
        assert_eq!(power_source(battery), Some("Battery Power"));
        assert_eq!(power_source("Now drawing from 'AC Power'\n"), Some("AC Power"));
        assert_eq!(power_source(""), None);
        let settings =
            |line: &str| format!("System-wide power settings:\nCurrently in use:\n standby  1\n {line}\n");
        for (line, expected) in [
            ("lowpowermode         1", Some("on")),
            ("lowpowermode         0", Some("off")),
            ("powermode            1", Some("on")),
            ("powermode            2", Some("high power")),
            ("powernap             1", None),
        ] {
            assert_eq!(low_power_mode(&settings(line)), expected, "{line}");
        }
    }
}
