//! `inbound` (sk_lookup): where a connection that arrives at a captured pod goes.
//!
//! There is no network namespace cookie here: the pod is known by the local address.

use crate::{
    ctx::{self, Connection},
    daemon, find,
    maps::{
        self, INBOUND, INBOUND_PORTS, INBOUND_SOCKETS, LISTENERS, LOCAL_FLOWS, OLD_LISTENERS, PROBE_FLOWS,
    },
    report::{self, count},
};
use aya_ebpf::{macros::sk_lookup, programs::SkLookupContext};
use mesh_common::{
    code::{counter, proto},
    decide::{self, Inbound},
    key,
    net::Ip,
};

/// `SK_PASS`: the usual look-up, or the socket that was assigned.
const PASS: u32 = 1;
/// `SK_DROP`: no socket, which the kernel answers with an RST.
const DROP: u32 = 0;

#[sk_lookup]
pub(crate) fn inbound(ctx: SkLookupContext) -> u32 {
    let Some((protocol, connection)) = ctx::lookup(&ctx) else { return PASS };
    if protocol != u32::from(proto::TCP) {
        return PASS;
    }
    let Connection { local, remote } = &connection;
    if !remote.port.is_some() && remote.addr.same(&local.addr) {
        // Nobody arrives: `connect` asks for the daemon's listener.
        return PASS;
    }
    let Some(pod) = find!(INBOUND, &local.addr) else {
        count(counter::INBOUND_PASS);
        return PASS;
    };
    let mut decision = decide::inbound(pod, &remote.addr, &local.addr, local.port.host());
    if let Inbound::LookFurther = decision {
        let strict = decide::strict(pod, find!(INBOUND_PORTS, local));
        let listens = listens(pod.cookie, &connection);
        decision = decide::inbound_open(vouched(&connection), listens, strict);
        if let Inbound::Steer = decision {
            // A daemon that hangs has its listener still.
            if daemon::beats() && INBOUND_SOCKETS.redirect_sk_lookup(&ctx, &local.addr, 0).is_ok() {
                count(counter::INBOUND_STEER);
                return PASS;
            }
            decision = decide::inbound_unsteered(strict);
        }
    }
    match decision {
        Inbound::Pass(outcome) => {
            count(outcome);
            PASS
        }
        Inbound::Drop(reason) => {
            count(counter::INBOUND_DROP);
            report::denied(reason, proto::TCP, pod.cookie, remote, local, true);
            DROP
        }
        // Both were replaced above.
        Inbound::Steer | Inbound::LookFurther => DROP,
    }
}

/// The `code::counter` of what this node itself vouches for: a connection that came to be in its kernel, from a pod with
/// a verdict in force or from a host process.
#[inline(always)]
fn vouched(connection: &Connection) -> Option<u32> {
    if is_allowed_flow(connection) {
        Some(counter::INBOUND_FLOW)
    } else if is_probe(connection) {
        Some(counter::INBOUND_PROBE)
    } else {
        None
    }
}

/// Whether a verdict lets a pod of this node connect without the daemon.
#[inline(always)]
fn is_allowed_flow(connection: &Connection) -> bool {
    match find!(LOCAL_FLOWS, key::Probe::new(connection.remote, connection.local)) {
        Some(flow) => daemon::is_current(flow.generation),
        None => false,
    }
}

/// Whether a host process of this node announced the connection a moment ago.
#[inline(always)]
fn is_probe(connection: &Connection) -> bool {
    match maps::copy(PROBE_FLOWS.get_ptr(key::Probe::new(connection.remote, connection.local))) {
        Some(probe) => decide::probe_holds(&probe, ctx::now()),
        None => false,
    }
}

/// Whether the pod listens on the port, on this address or on any.
#[inline(always)]
fn listens(cookie: u64, connection: &Connection) -> bool {
    let local = &connection.local;
    listener(&key::Listener::new(cookie, Ip::ANY, local.port))
        || listener(&key::Listener::new(cookie, local.addr, local.port))
}

#[inline(always)]
fn listener(key: &key::Listener) -> bool {
    if let Some(row) = find!(LISTENERS, key)
        && row.count > 0
    {
        return true;
    }
    find!(OLD_LISTENERS, key).is_some()
}
