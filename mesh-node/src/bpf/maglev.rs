//! Maglev's consistent hashing (Eisenbud et al., NSDI 2016), weighted: the table by which the kernel finds a client's
//! backend.
//!
//! Each backend has a permutation of the table's places, by its address alone, and takes the first free one whenever
//! its turn comes; turns follow the weights by stride scheduling. A backend that comes or goes then moves its own share
//! of the places and few others. Deliberately absent: the hash of a client (`mesh_common::decide::maglev_position`).

use mesh_common::{decide, net::Endpoint, value};
use std::{cmp::Reverse, collections::BinaryHeap, sync::Arc};

/// Sizes of tables. Primes, so that every step through a table visits all of it.
const SIZES: [u32; 5] = [251, 1021, 4093, 16_381, 65_521];

/// How many places for each backend there are if possible: a backend's share is then right to about a percent.
const PLACES: usize = 100;

/// How many there are at least, in the largest table.
const FEWEST_PLACES: usize = 10;

/// The size for this many backends; `None` when they are too many for the largest table.
pub(super) fn size(backends: usize) -> Option<u32> {
    let fits =
        |places: usize| SIZES.into_iter().find(|size| backends.saturating_mul(places) <= *size as usize);
    fits(PLACES).or_else(|| fits(FEWEST_PLACES).and(SIZES.last().copied()))
}

/// The table for these backends, which are all different, with weights that are not 0: in each place the number of a
/// backend. There must be at least one, and `size` must be of [`size`].
pub(super) fn table(backends: &[(Endpoint, u32)], size: u32) -> Vec<u16> {
    const FREE: u16 = u16::MAX;
    let mut table = vec![FREE; size as usize];
    let mut walks: Vec<Walk> = backends.iter().map(|(endpoint, _)| Walk::new(endpoint, size)).collect();
    let stride = |slot: usize| (1_u128 << 64) / u128::from(backends[slot].1.max(1));
    // Whose turn it is: the lowest pass, and of equal ones the lowest number. Everybody has a first turn.
    let mut turns: BinaryHeap<Reverse<(u128, usize)>> =
        (0..backends.len()).map(|slot| Reverse((0, slot))).collect();
    for _ in 0..size {
        let Some(Reverse((pass, slot))) = turns.pop() else { break };
        let place = loop {
            let place = walks[slot].next(size);
            if table[place] == FREE {
                break place;
            }
        };
        // Fewer backends than u16::MAX: the largest table has fewer places.
        table[place] = u16::try_from(slot).unwrap_or(FREE);
        turns.push(Reverse((pass + stride(slot), slot)));
    }
    table
}

/// The rows of a table; the last one is filled up with zeros.
pub(super) fn chunks(table: &[u16]) -> Arc<[value::MaglevChunk]> {
    let chunk = |slots: &[u16]| {
        let mut chunk = value::MaglevChunk { slots: [0; decide::MAGLEV_CHUNK as usize] };
        chunk.slots[..slots.len()].copy_from_slice(slots);
        chunk
    };
    table.chunks(decide::MAGLEV_CHUNK as usize).map(chunk).collect()
}

/// A walk through all places, in an order that depends on the endpoint alone.
struct Walk {
    place: u32,
    skip: u32,
}

impl Walk {
    fn new(endpoint: &Endpoint, size: u32) -> Self {
        let [a, b, c, d] = endpoint.addr.words.map(u64::from);
        let address = decide::mix(decide::mix(a << 32 | b) ^ (c << 32 | d));
        let hash = decide::mix(address ^ u64::from(endpoint.port.be));
        let below = |hash: u64, bound: u32| decide::cell((hash >> 32) as u32, bound);
        Self { place: below(hash, size), skip: 1 + below(decide::mix(hash), size - 1) }
    }

    fn next(&mut self, size: u32) -> usize {
        let place = self.place;
        // Both are below the size, which is far below half of u32.
        self.place = (self.place + self.skip) % size;
        place as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::net::{Ip, NetPort};
    use proptest::prelude::*;

    fn endpoint(n: u32) -> Endpoint {
        Endpoint::new(Ip::v4((0x0a01_0000 + n).to_be()), NetPort::new(8080))
    }

    fn equal(hosts: impl IntoIterator<Item = u32>) -> Vec<(Endpoint, u32)> {
        hosts.into_iter().map(|n| (endpoint(n), 1)).collect()
    }

    fn build(backends: &[(Endpoint, u32)]) -> Vec<u16> {
        table(backends, size(backends.len()).unwrap())
    }

    fn shares(table: &[u16], backends: usize) -> Vec<usize> {
        let mut shares = vec![0; backends];
        table.iter().for_each(|slot| shares[usize::from(*slot)] += 1);
        shares
    }

    /// The part of the places that lead to another backend, by endpoint.
    fn moved(before: &[(Endpoint, u32)], after: &[(Endpoint, u32)], size: u32) -> f64 {
        let (a, b) = (table(before, size), table(after, size));
        let differ =
            a.iter().zip(&b).filter(|(x, y)| before[usize::from(**x)].0 != after[usize::from(**y)].0).count();
        differ as f64 / f64::from(size)
    }

    #[test]
    fn sizes_are_primes_with_enough_places() {
        for size in SIZES {
            let divisor = (2..size).take_while(|d| d * d <= size).find(|d| size % d == 0);
            assert_eq!(divisor, None, "{size} is not prime");
        }
        let expected = [
            (1, Some(251)),
            (2, Some(251)),
            (3, Some(1021)),
            (40, Some(4093)),
            (41, Some(16_381)),
            (164, Some(65_521)),
            (6552, Some(65_521)),
            (6553, None),
            (usize::MAX, None),
        ];
        for (backends, size_expected) in expected {
            assert_eq!(size(backends), size_expected, "{backends}");
        }
    }

    #[test]
    fn equal_backends_have_equal_shares() {
        for count in [1, 2, 3, 7, 10, 100, 655] {
            let table = build(&equal(0..count));
            let shares = shares(&table, count as usize);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count}: {least} to {most} of {}", table.len());
        }
    }

    #[test]
    fn a_backend_that_goes_moves_little_more_than_its_own_share() {
        let mut worst: f64 = 0.0;
        for count in [2, 3, 5, 10, 20, 50, 100] {
            let all = equal(0..count);
            // The size of the larger set, since a change of size moves everybody.
            let size = size(all.len()).unwrap();
            let mut sum = 0.0;
            for gone in 0..count {
                let rest = equal((0..count).filter(|n| *n != gone));
                let moved = moved(&all, &rest, size) * f64::from(count);
                assert!(moved >= 0.95, "{count} without {gone}: its own share moves");
                // Places are handed on in turn; the more backends, the more often.
                let most = if count < 100 { 2.0 } else { 2.5 };
                assert!(moved <= most, "{count} without {gone}: {moved} shares moved");
                sum += moved;
                worst = worst.max(moved);
            }
            eprintln!("{count} backends: {:.3} shares move on average", sum / f64::from(count));
        }
        eprintln!("at most {worst:.3}");
    }

    #[test]
    fn chunks_hold_the_table() {
        let table = build(&equal(0..3));
        let chunks = chunks(&table);
        assert_eq!(chunks.len(), 4);
        let flat: Vec<u16> = chunks.iter().flat_map(|chunk| chunk.slots).collect();
        assert_eq!(flat[..table.len()], table);
        assert!(flat[table.len()..].iter().all(|slot| *slot == 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_backend_has_its_share_by_weight(weights in prop::collection::vec(1..=20_u32, 1..40)) {
            let backends: Vec<_> = (0..).map(endpoint).zip(weights.iter().copied()).collect();
            let table = build(&backends);
            prop_assert!(table.iter().all(|slot| usize::from(*slot) < backends.len()));
            let total: u32 = weights.iter().sum();
            for (share, weight) in shares(&table, backends.len()).into_iter().zip(&weights) {
                let exact = table.len() as f64 * f64::from(*weight) / f64::from(total);
                // A turn in advance for everybody at the start, and a part of a turn at the end.
                let slack = 2.0 + 0.03 * exact;
                prop_assert!((share as f64 - exact).abs() <= slack, "{share} for {exact:.1}: {weights:?}");
                prop_assert!(share > 0);
            }
        }

        #[test]
        fn the_order_of_the_others_does_not_matter_much(hosts in prop::collection::btree_set(0..1000_u32, 3..30)) {
            let all = equal(hosts.iter().copied());
            let size = size(all.len()).unwrap();
            let newcomer = equal(hosts.iter().copied().chain([5000]));
            let moved = moved(&all, &newcomer, size) * newcomer.len() as f64;
            prop_assert!((0.9..=2.0).contains(&moved), "{moved} shares for one newcomer");
        }
    }
}
