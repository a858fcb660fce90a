//! The kernel to user-space ABI and the pure capture decision.
#![no_std]
