//! Statistics of measured times.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// Confidence level of the intervals of a report.
pub const REPORT_CONFIDENCE: f64 = 0.95;

/// Returns the values in ascending order.
pub fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Returns the median: for an even count, the mean of the two middle values. Returns NaN for an empty slice.
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values.iter().copied());
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (count, middle) if count % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        (_, middle) => sorted[middle],
    }
}

/// Returns the lower quartile, or NaN for an empty slice.
pub fn lower_quartile(values: &[f64]) -> f64 {
    sorted(values.iter().copied()).get(values.len() / 4).copied().unwrap_or(f64::NAN)
}

/// Returns the mean of the middle half of the values. On a quiet machine it is nearly as precise as the mean,
/// and bursts that affect up to a quarter of the values at either end do not change it.
///
/// # Panics
/// Panics if `values` is empty.
pub fn midmean(values: &[f64]) -> f64 {
    let sorted = sorted(values.iter().copied());
    let cut = sorted.len() / 4;
    mean(&sorted[cut..sorted.len() - cut])
}

/// Returns the number of values that a trimmed mean leaves out at each end. Some processes are a third slower for their
/// whole life.
pub fn trim(count: usize) -> usize {
    count / 8
}

/// Returns the trimmed mean.
///
/// # Panics
/// Panics if `values` is empty.
pub fn trimmed_mean(values: &[f64]) -> f64 {
    let cut = trim(values.len());
    mean(&sorted(values.iter().copied())[cut..values.len() - cut])
}

/// Returns the standard error of the trimmed mean and its degrees of freedom. The error is infinite for a single value.
///
/// The values are winsorized (Yuen, "The two-sample trimmed t for unequal population variances", Biometrika 1974; here
/// for one sample).
pub fn trimmed_error(values: &[f64]) -> (f64, f64) {
    if values.len() < 2 {
        return (f64::INFINITY, 1.0);
    }
    let (n, cut) = (values.len(), trim(values.len()));
    let mut sorted = sorted(values.iter().copied());
    let (low, high) = (sorted[cut], sorted[n - 1 - cut]);
    sorted.iter_mut().for_each(|value| *value = value.clamp(low, high));
    let (n, remaining) = (n as f64, (n - 2 * cut) as f64);
    (std_dev(&sorted) * ((n - 1.0) / (remaining * (remaining - 1.0))).sqrt(), remaining - 1.0)
}

/// Returns half the width of the two-sided confidence interval of the trimmed mean, by Student's t.
pub fn trimmed_half_width(values: &[f64], confidence: f64) -> f64 {
    let (error, freedom) = trimmed_error(values);
    error * student_t_two_sided(freedom, 1.0 - confidence)
}

/// Returns the two-sided critical value of Student's t: the t that |T| exceeds with probability `alpha`.
pub fn student_t_two_sided(degrees_of_freedom: f64, alpha: f64) -> f64 {
    StudentsT::new(0.0, 1.0, degrees_of_freedom).expect("positive degrees").inverse_cdf(1.0 - alpha / 2.0)
}

/// Returns the arithmetic mean.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Returns the standard deviation of a sample, with n − 1 in the denominator.
pub fn std_dev(values: &[f64]) -> f64 {
    let center = mean(values);
    let squares: f64 = values.iter().map(|v| (v - center).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_the_mean_of_the_two_middle_values() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(&[9.0, 1.0, 5.0]), 5.0);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_midmean_ignores_a_quarter_at_either_end() {
        assert_eq!(midmean(&[1.0]), 1.0);
        assert_eq!(midmean(&[f64::MAX, 2.0, 4.0, f64::MIN]), 3.0);
        let values: Vec<f64> = (0..101).map(|i| f64::from(i * i % 101)).collect();
        let moved: Vec<f64> = values.iter().rev().map(|v| v + 3.0).collect();
        assert!((midmean(&moved) - midmean(&values) - 3.0).abs() < 1e-12);
    }
}
