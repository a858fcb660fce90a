//! What the programs report: counters, denial events, log lines.

use crate::{
    ctx,
    maps::{COUNTERS, EVENTS},
};
use aya_ebpf::EbpfContext;
use core::net::Ipv6Addr;
use mesh_common::{
    code::{counter, log_level},
    net::Endpoint,
    value,
};

/// Adds one to this CPU's counter.
#[inline(always)]
pub(crate) fn count(counter: u32) {
    if let Some(cell) = COUNTERS.get_ptr_mut(counter) {
        // SAFETY: the cell belongs to this CPU; a program that interrupts this one may cost a count, never more.
        unsafe { *cell += 1 };
    }
}

/// Reports a denial. `source` is [`Endpoint::NONE`] for an outbound one.
#[inline(always)]
pub(crate) fn denied(
    reason: u8,
    proto: u8,
    cookie: u64,
    source: &Endpoint,
    destination: &Endpoint,
    inbound: bool,
) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        count(counter::EVENT_LOST);
        return;
    };
    entry.write(value::DenyEvent {
        time_ns: ctx::now(),
        cookie,
        source: *source,
        destination: *destination,
        pid: if inbound { 0 } else { ctx::process() },
        reason,
        proto,
        inbound: inbound as u8,
        reserved: 0,
    });
    entry.submit(0);
}

/// Whether lines of a level are wanted now.
#[inline(always)]
fn wanted(config: &value::Config, level: u32) -> bool {
    config.log_level >= level
}

/// The address in a form that the log macros print; IPv4 as `::ffff:a.b.c.d`.
#[inline(always)]
fn address(endpoint: &Endpoint) -> Ipv6Addr {
    let words = endpoint.addr.words;
    let high = |word: u32| (u32::from_be(word) >> 16) as u16;
    let low = |word: u32| u32::from_be(word) as u16;
    Ipv6Addr::new(
        high(words[0]),
        low(words[0]),
        high(words[1]),
        low(words[1]),
        high(words[2]),
        low(words[2]),
        high(words[3]),
        low(words[3]),
    )
}

/// One line about a captured connection.
#[inline(always)]
pub(crate) fn log_captured(
    ctx: &impl EbpfContext,
    config: &value::Config,
    proto: u8,
    from: &Endpoint,
    to: &Endpoint,
) {
    if wanted(config, log_level::INFO) {
        aya_log_ebpf::info!(
            ctx,
            "captured proto {} dst [{:i}]:{} to [{:i}]:{}",
            proto,
            address(from),
            from.port.host(),
            address(to),
            to.port.host()
        );
    }
}

/// One line about a denial.
#[inline(always)]
pub(crate) fn log_denied(
    ctx: &impl EbpfContext,
    config: &value::Config,
    reason: u8,
    proto: u8,
    dst: &Endpoint,
) {
    if wanted(config, log_level::WARN) {
        aya_log_ebpf::warn!(
            ctx,
            "denied proto {} dst [{:i}]:{} reason {}",
            proto,
            address(dst),
            dst.port.host(),
            reason
        );
    }
}

/// One line about an unknown destination of a captured pod.
#[inline(always)]
pub(crate) fn log_passed(ctx: &impl EbpfContext, config: &value::Config, proto: u8, dst: &Endpoint) {
    if wanted(config, log_level::DEBUG) {
        aya_log_ebpf::debug!(ctx, "passed proto {} dst [{:i}]:{}", proto, address(dst), dst.port.host());
    }
}
