//! What this kernel has of the things that the programs can do without.
//!
//! Asked of the verifier with programs of a few instructions that use the thing, not by the kernel's version:
//! distributions carry things back, and a configuration can leave them out. The answer becomes a constant of the object
//! (`FEATURES`), so that branches which cannot run are never verified, and says which programs are left out.
//! Deliberately absent: what nothing works without. There the load itself is the probe, and its error names the program.

use super::sys;
use mesh_common::code::feature;
use std::{collections::BTreeSet, fmt, io, str::FromStr};

/// Something that a kernel may lack. [`Feature::cost`] says what that costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// `bpf_set_retval` at connect and sendmsg.
    SetRetval,
    /// `bpf_skc_lookup_tcp` at connect.
    ListenerLookup,
    /// The hooks `getpeername4` and `getpeername6`.
    Peername,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::SetRetval, Self::ListenerLookup, Self::Peername];

    /// The name in options and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SetRetval => "set-retval",
            Self::ListenerLookup => "listener-lookup",
            Self::Peername => "getpeername",
        }
    }

    /// The kernel that brought it.
    pub const fn since(self) -> &'static str {
        match self {
            Self::SetRetval => "5.18",
            Self::ListenerLookup => "5.2",
            Self::Peername => "5.8",
        }
    }

    /// What is different without it.
    pub const fn cost(self) -> &'static str {
        match self {
            Self::SetRetval => {
                "refused TCP connects end with ECONNREFUSED by a detour over the pod's own port 0; refused UDP \
                 sends end with EPERM"
            }
            Self::ListenerLookup => {
                "in the 3 s after the daemon was killed, connections that need it are refused even where they \
                 could go without it"
            }
            Self::Peername => {
                "getpeername() and accept() show the addresses of the daemon and of backends, not of services \
                 and clients"
            }
        }
    }

    /// The features that a list of names means; empty names are none.
    pub fn parse_all(names: &[String]) -> Result<BTreeSet<Self>, UnknownFeature> {
        names.iter().filter(|name| !name.is_empty()).map(|name| name.parse()).collect()
    }

    fn bit(self) -> u32 {
        match self {
            Self::SetRetval => feature::SET_RETVAL,
            Self::ListenerLookup => feature::LISTENER_LOOKUP,
            // A matter of whole programs, which the others need not know.
            Self::Peername => 0,
        }
    }

    fn is_there(self) -> io::Result<bool> {
        match self {
            Self::SetRetval => accepted(CONNECT4, &[mov(1, 0), call(SET_RETVAL), mov(0, 1), EXIT]),
            Self::ListenerLookup => accepted(CONNECT4, &look_up_and_release()),
            Self::Peername => {
                Ok(accepted(GETPEERNAME4, &[mov(0, 1), EXIT])? && accepted(GETPEERNAME6, &[mov(0, 1), EXIT])?)
            }
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Feature {
    type Err = UnknownFeature;

    fn from_str(name: &str) -> Result<Self, UnknownFeature> {
        Self::ALL
            .into_iter()
            .find(|feature| feature.name() == name)
            .ok_or_else(|| UnknownFeature(name.to_owned()))
    }
}

/// A name that no feature has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no feature {0:?}; there are set-retval, listener-lookup and getpeername")]
pub struct UnknownFeature(String);

/// What the kernel has and nobody disabled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features(BTreeSet<Feature>);

impl Features {
    /// Asks the kernel. Needs the capabilities that loading needs; what is in `disabled` counts as missing.
    pub fn probe(disabled: &BTreeSet<Feature>) -> io::Result<Self> {
        let mut there = BTreeSet::new();
        for feature in Feature::ALL {
            if !disabled.contains(&feature) && feature.is_there()? {
                there.insert(feature);
            }
        }
        Ok(Self(there))
    }

    /// Whether it can be used.
    pub fn has(&self, feature: Feature) -> bool {
        self.0.contains(&feature)
    }

    /// What has to be done without.
    pub fn missing(&self) -> impl Iterator<Item = Feature> {
        Feature::ALL.into_iter().filter(|feature| !self.has(*feature))
    }

    /// The programs' constant.
    pub(super) fn bits(&self) -> u32 {
        self.0.iter().fold(0, |bits, feature| bits | feature.bit())
    }

    /// Whether a program of the object can be loaded.
    pub(super) fn allow(&self, program: &str) -> bool {
        self.has(Feature::Peername) || !program.starts_with("getpeername")
    }
}

/// Attach types of `enum bpf_attach_type`, `include/uapi/linux/bpf.h`; programs of socket addresses all.
const CONNECT4: u32 = 10;
const GETPEERNAME4: u32 = 29;
const GETPEERNAME6: u32 = 30;

/// Helpers of `enum bpf_func_id`.
const SK_RELEASE: i32 = 86;
const SKC_LOOKUP_TCP: i32 = 99;
const SET_RETVAL: i32 = 187;

/// One instruction, as `struct bpf_insn` is laid out on a little-endian machine.
const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    let registers = if cfg!(target_endian = "big") { (dst << 4) | src } else { dst | (src << 4) };
    let (offset, immediate) = (offset.cast_unsigned().to_ne_bytes(), immediate.cast_unsigned().to_ne_bytes());
    u64::from_ne_bytes([
        code,
        registers,
        offset[0],
        offset[1],
        immediate[0],
        immediate[1],
        immediate[2],
        immediate[3],
    ])
}

/// `dst = value`.
const fn mov(dst: u8, value: i32) -> u64 {
    instruction(0xb7, dst, 0, 0, value)
}

/// `dst = src`.
const fn copy(dst: u8, src: u8) -> u64 {
    instruction(0xbf, dst, src, 0, 0)
}

const fn call(helper: i32) -> u64 {
    instruction(0x85, 0, 0, 0, helper)
}

const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);

/// Looks a socket up by a tuple of zeroes on the stack, in the current namespace, and gives it back.
fn look_up_and_release() -> [u64; 13] {
    let store_zero = |offset| instruction(0x7a, 10, 0, offset, 0);
    let add = |dst, value| instruction(0x07, dst, 0, 0, value);
    let if_zero_skip = |register, by| instruction(0x15, register, 0, by, 0);
    [
        store_zero(-8),
        store_zero(-16),
        // The context is in register 1 from the start.
        copy(2, 10),
        add(2, -16),
        mov(3, 12),
        mov(4, -1),
        mov(5, 0),
        call(SKC_LOOKUP_TCP),
        if_zero_skip(0, 2),
        copy(1, 0),
        call(SK_RELEASE),
        mov(0, 1),
        EXIT,
    ]
}

/// Whether the verifier takes a program of the cgroup's socket-address hooks.
fn accepted(attach_type: u32, program: &[u64]) -> io::Result<bool> {
    /// The kernel's own ENOTSUPP, which has no name in user space.
    const NOT_SUPPORTED: i32 = 524;
    match sys::try_sock_addr(attach_type, program) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINVAL | libc::EACCES | libc::EOPNOTSUPP | NOT_SUPPORTED) => Ok(false),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart_and_unknown_ones_listed() {
        for feature in Feature::ALL {
            assert_eq!(feature.name().parse(), Ok(feature));
            assert!("tc".parse::<Feature>().unwrap_err().to_string().contains(feature.name()), "{feature}");
            assert!(!feature.cost().is_empty());
        }
        assert_eq!(Feature::parse_all(&[String::new()]), Ok(BTreeSet::new()));
    }

    #[test]
    fn instructions_have_the_kernels_layout() {
        // r1 = 7; call 187; exit, as an assembler writes them.
        assert_eq!(mov(1, 7).to_ne_bytes(), [0xb7, 1, 0, 0, 7, 0, 0, 0]);
        assert_eq!(call(SET_RETVAL).to_ne_bytes(), [0x85, 0, 0, 0, 187, 0, 0, 0]);
        assert_eq!(copy(2, 10).to_ne_bytes(), [0xbf, 0xa2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(instruction(0x7a, 10, 0, -8, 0).to_ne_bytes(), [0x7a, 0x0a, 0xf8, 0xff, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_missing_leaves_its_bit_and_its_programs_out() {
        let all = Features(Feature::ALL.into());
        assert_eq!(all.bits(), feature::SET_RETVAL | feature::LISTENER_LOOKUP);
        assert!(all.allow("getpeername4") && all.missing().next().is_none());
        let few = Features([Feature::ListenerLookup].into());
        assert_eq!(few.bits(), feature::LISTENER_LOOKUP);
        assert!(!few.allow("getpeername6") && few.allow("connect4"));
        assert_eq!(few.missing().collect::<Vec<_>>(), [Feature::SetRetval, Feature::Peername]);
    }
}
