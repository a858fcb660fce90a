//! The `abi!` macro: the only way to declare a type that crosses the boundary.

/// Declares `repr(C)` structs that the kernel and user space share, and checks their layout at compile time.
///
/// ```text
/// abi! {
///     /// What it is.
///     pub struct Name: 8 {            // the size in bytes
///         /// What the field is.
///         pub field: u32 @ 0,         // the offset in bytes
///         pub other: u16 @ 4,
///         _pad: [u8; 2] @ 6,
///     }
/// }
/// ```
///
/// The sum of the field sizes has to equal the size, so that there is no padding that the compiler chose (the kernel
/// compares keys byte by byte, and padding would be garbage). The alignment is at most 8, which is what the kernel
/// gives map values. Field types implement [`crate::pod::Pod`].
macro_rules! abi {
    ($(
        $(#[$meta:meta])*
        pub struct $name:ident: $size:literal {
            $( $(#[$field_meta:meta])* $vis:vis $field:ident: $ty:ty = $offset:literal, )+
        }
    )+) => { $(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name {
            $( $(#[$field_meta])* $vis $field: $ty, )+
        }

        const _: () = {
            assert!(core::mem::size_of::<$name>() == $size, "the size is not what the declaration says");
            assert!(core::mem::align_of::<$name>() <= 8, "the kernel aligns map values to 8 bytes");
            assert!(0 $( + core::mem::size_of::<$ty>() )+ == $size, "there is padding that no field names");
            $( assert!(core::mem::offset_of!($name, $field) == $offset, "a field is not at its offset"); )+
        };

        crate::pod::impl_pod!($name { $( $ty ),+ });
    )+ };
}

pub(crate) use abi;
