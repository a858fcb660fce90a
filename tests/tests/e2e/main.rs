//! End-to-end tests on the real kernel with the real daemons. They need root and are run one at a time
//! (`cargo xtask test --only e2e`).

mod away;
mod backends;
mod bad_input;
mod bytes;
mod capture;
mod chaos;
mod coexist;
mod crash;
mod dns;
mod enrolment;
mod harness;
mod limits;
mod outcomes;
mod peers;
mod policy;
mod resilience;
mod samenode;
mod scale;
mod support;
mod upgrade;
