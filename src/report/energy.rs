//! Energy of training steps, in a table for each kind of hardware that is counted.

use super::format::{digits, or_dash, percent};
use super::table::Table;
use crate::energy::Scope;
use crate::results::energy::CaseEnergy;

/// Returns a table for each scope. Energies of a board and of a package are not comparable.
pub fn tables(all: &[CaseEnergy]) -> Vec<Table> {
    [Scope::Board, Scope::Package, Scope::Cores].into_iter().filter_map(|scope| table(all, scope)).collect()
}

fn table(all: &[CaseEnergy], scope: Scope) -> Option<Table> {
    let row = |case: &CaseEnergy| {
        let energy = &case.energy;
        vec![
            case.id.clone(),
            digits(case.joules_per_sample()),
            digits(energy.watts()),
            digits(energy.idle_watts),
            or_dash(energy.limit_watts.map(|limit| percent(energy.watts() / limit))),
            digits(energy.seconds),
        ]
    };
    let rows: Vec<Vec<String>> = all.iter().filter(|case| case.energy.scope == scope).map(row).collect();
    let note = format!(
        "The counter counts the {scope}, including their idle power. Idle power was measured with the case loaded."
    );
    let header = "case|J/sample|W|idle W|of the power limit|seconds";
    (!rows.is_empty()).then(|| Table::new(format!("Energy of the {scope}"), &note, header, rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::energy::StepEnergy;

    #[test]
    fn boards_and_packages_have_separate_tables() {
        let case = |id: &str, scope| CaseEnergy {
            id: id.to_owned(),
            batch: 16,
            energy: StepEnergy {
                scope,
                joules: 2500.0,
                seconds: 5.0,
                steps: 1000,
                idle_watts: 110.0,
                limit_watts: (scope == Scope::Board).then_some(700.0),
            },
            commit: String::new(),
        };
        let tables = tables(&[case("gpu", Scope::Board), case("cpu", Scope::Package)]);
        assert_eq!(tables.len(), 2);
        assert_eq!(tables[0].rows, [["gpu", "0.156", "500", "110", "71.4 %", "5.00"]]);
        assert_eq!(tables[1].rows[0][4], "–");
        assert!(tables[0].title.ends_with("board") && tables[1].title.ends_with("packages"));
    }
}
