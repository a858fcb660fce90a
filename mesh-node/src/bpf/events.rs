//! Denials as the kernel reports them.

use super::sys;
use aya::maps::{MapData, RingBuf};
use mesh_common::{
    code::{DenyReason, proto},
    net::Endpoint,
    pod::Pod as _,
    value,
};
use mesh_xds::model::Protocol;
use std::{io, net::SocketAddr};

/// A connection that the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenyEvent {
    /// Why.
    pub reason: DenyReason,
    /// The captured pod, by its network namespace's cookie: the client of an outbound denial, the target of an
    /// inbound one.
    pub cookie: u64,
    /// True when the connection came to the pod.
    pub inbound: bool,
    /// The client's address; `None` outbound, where the socket has none yet.
    pub src: Option<SocketAddr>,
    /// What was dialled.
    pub dst: SocketAddr,
    /// TCP or UDP.
    pub proto: Protocol,
    /// The client's process id as the host sees it; `None` inbound.
    pub pid: Option<u32>,
}

/// The reading end of the event buffer. The buffer is bounded: what does not fit is counted
/// (`Counter::EventLost`).
pub struct DenyEvents {
    buffer: RingBuf<MapData>,
}

impl DenyEvents {
    pub(super) fn new(buffer: RingBuf<MapData>) -> Self {
        Self { buffer }
    }

    /// The next event that is there. Events of an unknown form are skipped.
    pub fn try_next(&mut self) -> Option<DenyEvent> {
        while let Some(item) = self.buffer.next() {
            if let Some(event) = value::DenyEvent::from_bytes(&item).and_then(decode) {
                return Some(event);
            }
        }
        None
    }

    /// Waits for the events and hands each to `each`, until the future is dropped. Needs a tokio runtime.
    pub async fn run(self, mut each: impl FnMut(DenyEvent) + Send) -> io::Result<()> {
        let mut poll = sys::readable(self.buffer)?;
        loop {
            let mut ready = poll.readable_mut().await?;
            while let Some(item) = ready.get_inner_mut().next() {
                if let Some(event) = value::DenyEvent::from_bytes(&item).and_then(decode) {
                    each(event);
                }
            }
            ready.clear_ready();
        }
    }
}

fn decode(event: value::DenyEvent) -> Option<DenyEvent> {
    Some(DenyEvent {
        reason: DenyReason::try_from(event.reason).ok()?,
        cookie: event.cookie,
        inbound: event.inbound != 0,
        src: (event.source != Endpoint::NONE).then(|| event.source.into()),
        dst: event.destination.into(),
        proto: if event.proto == proto::UDP { Protocol::Udp } else { Protocol::Tcp },
        pid: (event.pid != 0).then_some(event.pid),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::code::deny;

    #[test]
    fn events_decode_and_unknown_reasons_do_not() {
        let raw = value::DenyEvent {
            reason: deny::NO_ENDPOINTS,
            proto: proto::TCP,
            cookie: 7,
            destination: "10.96.0.1:80".parse::<SocketAddr>().unwrap().into(),
            pid: 42,
            ..value::DenyEvent::zeroed()
        };
        let event = decode(raw).unwrap();
        assert_eq!((event.reason, event.src, event.pid), (DenyReason::NoEndpoints, None, Some(42)));
        assert_eq!(event.dst.to_string(), "10.96.0.1:80");
        assert!(decode(value::DenyEvent { reason: 200, ..raw }).is_none());
    }
}
