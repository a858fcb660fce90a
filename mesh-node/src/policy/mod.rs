//! L4 authorization: which connection may reach a workload. Pure: values in, verdict out.
//!
//! A [`PolicySet`] is what applies to one workload, picked and prepared once and then immutable. [`PolicySet::check`]
//! answers for one connection; [`PolicySet::strictness`] answers for the kernel, which ports may be reached without
//! asking us. Semantics are Istio's (the model's documentation has them); a policy that never matches denies nothing
//! and allows nothing.
//!
//! Absent on purpose: AUDIT and CUSTOM actions and L7 attributes, which the control plane refuses or turns into a denial
//! before they get here; and any cache of verdicts.

mod matcher;
mod set;

pub use matcher::ConnMeta;
pub use set::{DeniedBy, PolicySet, Strictness, Verdict};
