//! The only `unsafe` of this crate: plain-old-data types and their bytes.
#![allow(unsafe_code)]

/// A type whose every bit pattern is valid and which has no padding.
///
/// # Safety
///
/// The type has to be `repr(C)` or a primitive integer, made of `Pod` fields only, without padding and without
/// interior pointers. [`impl_pod!`] (through `abi!`) is the only implementor outside this file.
pub unsafe trait Pod: Copy + 'static {
    /// The value's bytes, in the machine's order.
    fn bytes(&self) -> &[u8] {
        // SAFETY: a Pod has no padding, so that all of its bytes are initialised; the slice borrows from self.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }

    /// The value that these bytes are; `None` when the length is wrong. The slice need not be aligned.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, any bit pattern is a valid Pod, and the read does not need alignment.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }

    /// The value of which all bytes are zero.
    fn zeroed() -> Self {
        // SAFETY: any bit pattern is a valid Pod.
        unsafe { core::mem::zeroed() }
    }
}

/// Implements [`Pod`] for a struct of the `abi!` macro and proves that its fields are Pod.
macro_rules! impl_pod {
    ($name:ident { $($ty:ty),+ }) => {
        const _: () = {
            const fn field<T: $crate::pod::Pod>() {}
            $( field::<$ty>(); )+
        };
        // SAFETY: abi! makes the struct repr(C) and asserts that its fields fill it; each field was proven Pod above.
        #[allow(unsafe_code)]
        unsafe impl $crate::pod::Pod for $name {}
    };
}

pub(crate) use impl_pod;

// SAFETY: primitive integers have neither padding nor invalid bit patterns.
unsafe impl Pod for u8 {}
// SAFETY: as above.
unsafe impl Pod for u16 {}
// SAFETY: as above.
unsafe impl Pod for u32 {}
// SAFETY: as above.
unsafe impl Pod for u64 {}
// SAFETY: an array of Pod has no padding between its elements.
unsafe impl<T: Pod, const N: usize> Pod for [T; N] {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_lengths_are_checked() {
        let value = [0x0102_0304_u32, 5];
        assert_eq!(<[u32; 2]>::from_bytes(value.bytes()), Some(value));
        assert_eq!(<[u32; 2]>::from_bytes(&value.bytes()[..7]), None);
        assert_eq!(u64::zeroed(), 0);
    }
}
