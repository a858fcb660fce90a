//! Vose's alias table in integers: weighted choice among any number of backends in constant time.
//!
//! The kernel draws a cell evenly and then 32 random bits: a draw up to the cell's threshold stays in the cell, the
//! others go to its alias. Deliberately absent: floating point. The table gives each weight its share of the
//! `count * 2^32` outcomes, rounded to a whole outcome, and not an outcome more or less.

/// The outcomes of one cell.
const CELL: u64 = 1 << 32;

/// One cell of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// The highest draw that stays.
    pub(super) threshold: u32,
    /// Where the others go.
    pub(super) alias: u32,
}

/// The table for these weights; none of them may be 0. Equal weights give equal tables.
pub(super) fn table(weights: &[u32]) -> Vec<Cell> {
    let mut left = outcomes(weights);
    let mut cells: Vec<Cell> =
        (0..).map(|alias| Cell { threshold: u32::MAX, alias }).take(weights.len()).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) =
        (0..weights.len()).partition(|slot| left[*slot] < CELL);
    // Every cell holds exactly CELL outcomes and all of them are given away, so that while one wants less than a cell
    // another one wants more. What remains in the end is exactly one cell each, which is what `cells` starts with.
    while let (Some(below), Some(&above)) = (small.pop(), large.last()) {
        let stay = left[below];
        cells[below] = Cell { threshold: to_u32(stay.saturating_sub(1)), alias: to_u32(above as u64) };
        left[above] -= CELL - stay;
        if left[above] < CELL {
            large.pop();
            small.push(above);
        }
    }
    cells
}

/// How many of the `count * CELL` outcomes each weight gets: its exact share rounded down, and one more for those with
/// the largest remainders, until all are given away.
fn outcomes(weights: &[u32]) -> Vec<u64> {
    let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let all = weights.len() as u128 * u128::from(CELL);
    let mut shares = Vec::with_capacity(weights.len());
    let mut remainders = Vec::with_capacity(weights.len());
    for (slot, weight) in weights.iter().enumerate() {
        let exact = u128::from(*weight) * all;
        // At least 1, since a weight of at least 1 is never less than 1 / (count * 2^32) of weights below 2^32; at
        // most `all`, which fits: a table has fewer than 2^32 cells.
        shares.push((exact / total) as u64);
        remainders.push((exact % total, slot));
    }
    let given: u128 = shares.iter().map(|share| u128::from(*share)).sum();
    remainders.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    // Each rounding left less than one outcome, so that there are fewer than `count` to give.
    for (_, slot) in remainders.into_iter().take((all - given) as usize) {
        shares[slot] += 1;
    }
    shares
}

/// For numbers that are below 2^32 by construction.
fn to_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::{decide, pod::Pod as _, value};
    use proptest::prelude::*;

    /// The outcomes that lead to each slot when the kernel's function reads the table.
    fn masses(cells: &[Cell]) -> Vec<u64> {
        let mut masses = vec![0; cells.len()];
        for (slot, cell) in cells.iter().enumerate() {
            let slot = u32::try_from(slot).unwrap();
            let row =
                value::Backend { threshold: cell.threshold, alias: cell.alias, ..value::Backend::zeroed() };
            let stay = u64::from(cell.threshold) + 1;
            assert_eq!(decide::slot(cell.threshold, slot, &row), slot, "the last draw that stays");
            masses[slot as usize] += stay;
            if stay < CELL {
                assert_eq!(decide::slot(cell.threshold + 1, slot, &row), cell.alias, "the first that goes");
                masses[cell.alias as usize] += CELL - stay;
            }
        }
        masses
    }

    fn check(weights: &[u32]) {
        let masses = masses(&table(weights));
        assert_eq!(masses, outcomes(weights), "the table hands out what was shared out");
        let total: u128 = weights.iter().map(|w| u128::from(*w)).sum();
        let all = weights.len() as u128 * u128::from(CELL);
        assert_eq!(masses.iter().map(|m| u128::from(*m)).sum::<u128>(), all, "not an outcome is lost");
        for (slot, (mass, weight)) in masses.iter().zip(weights).enumerate() {
            let (got, exact) = (u128::from(*mass) * total, u128::from(*weight) * all);
            assert!(got.abs_diff(exact) < total, "slot {slot}: {mass} is not {exact} / {total} rounded");
            assert!(*mass > 0, "slot {slot} would never be chosen");
        }
    }

    #[test]
    fn equal_weights_never_leave_the_cell() {
        for count in [1, 2, 3, 7, 1000] {
            assert!(table(&vec![5; count]).iter().all(|cell| cell.threshold == u32::MAX));
        }
        assert_eq!(table(&[]), []);
    }

    #[test]
    fn simple_ratios_are_exact() {
        assert_eq!(masses(&table(&[1, 3])), [CELL / 2, CELL / 2 * 3]);
        assert_eq!(masses(&table(&[2, 1, 1])), [CELL / 2 * 3, CELL / 4 * 3, CELL / 4 * 3]);
    }

    #[test]
    fn extremes() {
        check(&[1, u32::MAX]);
        check(&[u32::MAX, 1, u32::MAX, 1, 1]);
        let mut huge = vec![u32::MAX; 5000];
        huge.extend([1; 5]);
        check(&huge);
        let many: Vec<u32> = (0..100_000_u32).map(|n| n.wrapping_mul(2_654_435_761) % 1000 + 1).collect();
        check(&many);
    }

    proptest! {
        #[test]
        fn every_weight_gets_its_share(weights in prop::collection::vec(1..=u32::MAX, 1..60)) {
            check(&weights);
        }

        #[test]
        fn small_weights_too(weights in prop::collection::vec(1..=100_u32, 1..200)) {
            check(&weights);
        }
    }
}
