//! Statistics that the suite takes of times.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// In ascending order.
pub fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The value in the middle, the upper of two; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    sorted(values.iter().copied()).get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value that a quarter lies below; NaN of none.
pub fn lower_quartile(values: &[f64]) -> f64 {
    sorted(values.iter().copied()).get(values.len() / 4).copied().unwrap_or(f64::NAN)
}

/// Mean of the middle half: nearly as precise as the mean in quiet, and blind to the
/// quarter of the values that bursts spoil on either end.
///
/// # Panics
/// Where there are no values.
pub fn midmean(values: &[f64]) -> f64 {
    let sorted = sorted(values.iter().copied());
    let cut = sorted.len() / 4;
    let middle = &sorted[cut..sorted.len() - cut];
    middle.iter().sum::<f64>() / middle.len() as f64
}

/// The value that Student's t with so much freedom leaves with probability `outside`, both ends
/// together.
pub fn student_t_two_sided(freedom: f64, outside: f64) -> f64 {
    StudentsT::new(0.0, 1.0, freedom).expect("positive degrees").inverse_cdf(1.0 - outside / 2.0)
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation of a sample.
pub fn std_dev(values: &[f64]) -> f64 {
    let centre = mean(values);
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_midmean_ignores_a_quarter_on_either_end() {
        assert_eq!(midmean(&[1.0]), 1.0);
        assert_eq!(midmean(&[f64::MAX, 2.0, 4.0, f64::MIN]), 3.0);
        let values: Vec<f64> = (0..101).map(|i| f64::from(i * i % 101)).collect();
        let moved: Vec<f64> = values.iter().rev().map(|v| v + 3.0).collect();
        assert!((midmean(&moved) - midmean(&values) - 3.0).abs() < 1e-12);
    }
}
