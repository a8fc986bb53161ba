//! Cases and dropout masks for the tests of the reference.

use super::Site;
use crate::model::{ModelId, OPTION_MODELS};
use crate::suite::{BackendId, Case, CustomModel, Method, Precision, Set, cases_for};

/// Returns the miniature cases of every workload for every model option, on one device and without micro-batches.
pub fn cases() -> Vec<Case> {
    let options = OPTION_MODELS.iter().map(|&model| {
        let model = ModelId::intern(model);
        Some(CustomModel::plain(model, 2))
    });
    let models = [None].into_iter().chain(options);
    let mut all: Vec<Case> = models.flat_map(|custom| cases_for(Set::Smoke, custom.as_ref())).collect();
    let eager = Method::eager(Precision::F32);
    all.retain(|c| c.backend == BackendId::TorchCpu && c.method == eager && c.shape == c.shape.undivided());
    all
}

/// Drops one of eight numbers at every site, as [`super::DropoutMasks`].
pub fn masks(sample: usize, site: Site, [rows, columns]: [usize; 2]) -> Option<Vec<f64>> {
    let seed = format!("{sample} {site:?}").bytes().fold(0, |seed, byte| hash(seed, u64::from(byte)));
    let factor = |i| if hash(seed, i).is_multiple_of(8) { 0.0 } else { 8.0 / 7.0 };
    Some((0..(rows * columns) as u64).map(factor).collect())
}

/// Returns a pseudorandom number, as splitmix64 does (Steele et al. 2014).
pub fn hash(seed: u64, index: u64) -> u64 {
    let mut hash = seed ^ index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}
