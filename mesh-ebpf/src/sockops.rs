//! `sock_ops`: what has to happen at certain moments of a TCP connection's life.
//!
//! `TCP_CONNECT_CB` (the source port is chosen, the SYN not yet sent) publishes what the accepting side needs under
//! the 4-tuple; `PASSIVE_ESTABLISHED_CB` moves it into the accepted socket's storage. `ACTIVE_ESTABLISHED_CB` would be
//! too late for the former: with TCP Fast Open the accepting side is first.

use crate::{
    ctx::{self, Connection},
    find,
    maps::{
        self, CLIENT, CLIENT_FLOWS, DIRECT_STATS, LISTENERS, LOCAL_FLOWS, ORIG_DST, ORIG_DST_FLOWS, PODS,
        PROBE_FLOWS, SOCKET_FLOW, Shared, Storage as _,
    },
    report::count,
};
use aya_ebpf::{
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, BPF_TCP_FIN_WAIT2, BPF_TCP_LISTEN, BPF_TCP_SYN_SENT,
        bpf_sock,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use mesh_common::{
    code::{counter, flow},
    decide, key, value,
};

/// The return value of a sockops program: no reply.
const DONE: u32 = 1;

#[sock_ops]
pub(crate) fn sock_ops(ctx: SockOpsContext) -> u32 {
    // Most events are of no interest; the addresses are read only for those that are.
    let event = ctx::sock_ops_event(&ctx);
    if event == BPF_SOCK_OPS_TCP_CONNECT_CB {
        connecting(&ctx);
    } else if event == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        accepted(&ctx);
    } else if event == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        connected(&ctx);
    } else if event == BPF_SOCK_OPS_TCP_LISTEN_CB {
        listening(&ctx);
    } else if event == BPF_SOCK_OPS_STATE_CB {
        state_changed(&ctx);
    }
    DONE
}

/// A client is about to send its SYN.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let socket = ctx::sock_ops_socket(ctx);
    if socket.is_null() {
        return;
    }
    if let Some(dialled) = SOCKET_FLOW.of(socket) {
        let Connection { local, remote } = ctx::connection(ctx);
        if !dialled.actual.same(&remote) {
            return;
        }
        let stored = if dialled.kind == u32::from(flow::PROXY) {
            ORIG_DST_FLOWS.insert(
                key::Flow::new(dialled.cookie, local, remote),
                value::OriginalDst { original: dialled.original, chosen: dialled.chosen },
                0,
            )
        } else if dialled.kind == u32::from(flow::LOCAL) {
            publish_local(ctx, dialled, &key::Probe::new(local, remote));
            Ok(())
        } else if dialled.kind == u32::from(flow::PROBE) {
            PROBE_FLOWS.insert(key::Probe::new(local, remote), value::Probe { seen_ns: ctx::now() }, 0)
        } else {
            Ok(())
        };
        if stored.is_err() {
            count(counter::STORE_FAILED);
        }
    } else if let Some(client) = CLIENT.of(socket) {
        let client = *client;
        let Connection { local, remote } = ctx::connection(ctx);
        let flow = key::Flow::new(ctx::sock_ops_netns(ctx), local, remote);
        if CLIENT_FLOWS.insert(flow, client, 0).is_err() {
            count(counter::STORE_FAILED);
        }
    }
}

/// Opens the way through the target's sk_lookup program, until the connection ends.
#[inline(always)]
fn publish_local(ctx: &SockOpsContext, dialled: &value::SocketFlow, key: &key::Probe) {
    let flow = value::LocalFlow {
        cookie: dialled.cookie,
        generation: dialled.generation,
        opened_ns: ctx::now(),
        original: dialled.original,
        reserved: 0,
    };
    if LOCAL_FLOWS.insert(key, flow, 0).is_err() {
        count(counter::LOCAL_FLOWS_FULL);
    }
    // Also of a connection that never comes about.
    ctx::change_flags(ctx, BPF_SOCK_OPS_STATE_CB_FLAG, 0);
}

/// A server's new socket.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    // Inherited from the listening socket, which wanted to hear of its own end only.
    ctx::change_flags(ctx, 0, BPF_SOCK_OPS_STATE_CB_FLAG);
    let cookie = ctx::sock_ops_netns(ctx);
    let Some(pod) = find!(PODS, key::Netns::new(cookie)) else { return };
    let socket = ctx::sock_ops_socket(ctx);
    if socket.is_null() {
        return;
    }
    let Connection { local, remote } = ctx::connection(ctx);
    let flow = key::Flow::new(cookie, remote, local);
    if decide::is_outbound_listener(pod, &local) {
        match maps::copy(ORIG_DST_FLOWS.get_ptr(&flow)) {
            Some(original) => {
                store(&ORIG_DST, socket, original, counter::ORIG_DST_SET);
                let _: Result<(), i32> = ORIG_DST_FLOWS.remove(&flow);
            }
            None => count(counter::ORIG_DST_MISSING),
        }
    } else if let Some(client) = maps::copy(CLIENT_FLOWS.get_ptr(&flow)) {
        store(&CLIENT, socket, client, counter::CLIENT_SET);
        let _: Result<(), i32> = CLIENT_FLOWS.remove(&flow);
    }
}

#[inline(always)]
fn store<T: Copy + 'static>(
    map: &aya_ebpf::btf_maps::SkStorage<T>,
    socket: *mut bpf_sock,
    value: T,
    counter: u32,
) {
    count(if map.set(socket, value) { counter } else { counter::STORE_FAILED });
}

/// A client's connection is established.
#[inline(always)]
fn connected(ctx: &SockOpsContext) {
    let Some(dialled) = counted_socket(ctx::sock_ops_socket(ctx)) else { return };
    count(counter::DIRECT_OPENED);
    if let Some(row) = direct_row(&row_key(dialled)) {
        row.opened(1);
        // The end of the connection brings its bytes.
        ctx::change_flags(ctx, BPF_SOCK_OPS_STATE_CB_FLAG, 0);
    }
}

/// A socket listens.
#[inline(always)]
fn listening(ctx: &SockOpsContext) {
    let cookie = ctx::sock_ops_netns(ctx);
    if find!(PODS, key::Netns::new(cookie)).is_none() {
        return;
    }
    let Connection { local, .. } = ctx::connection(ctx);
    let key = key::Listener::new(cookie, local.addr, local.port);
    let first = value::Listener { count: 1 };
    if let Some(count) = listener(&key) {
        count.add(1);
    } else if LISTENERS.insert(&key, first, BPF_NOEXIST as u64).is_err() {
        // Either another socket was first, or the map is full.
        match listener(&key) {
            Some(count) => {
                count.add(1);
            }
            None => count(counter::LISTENERS_FULL),
        }
    }
    ctx::change_flags(ctx, BPF_SOCK_OPS_STATE_CB_FLAG, 0);
}

/// A listening socket or a direct connection changes its state.
#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    let (old, new) = ctx::state_change(ctx);
    if old == BPF_TCP_LISTEN {
        let Connection { local, .. } = ctx::connection(ctx);
        let key = key::Listener::new(ctx::sock_ops_netns(ctx), local.addr, local.port);
        // The row stays with a count of 0 (user space removes it): removing it here would race with a new listener.
        if let Some(count) = listener(&key)
            && count.load() > 0
        {
            count.add(-1);
        }
    } else if new == BPF_TCP_FIN_WAIT2 {
        let Some(dialled) = counted_socket(ctx::sock_ops_socket(ctx)) else { return };
        dialled.received_at_fin = ctx::byte_counts(ctx).1 as u32;
    } else if new == BPF_TCP_CLOSE {
        let Some(dialled) = counted_socket(ctx::sock_ops_socket(ctx)) else { return };
        if dialled.kind == u32::from(flow::LOCAL) {
            let Connection { local, remote } = ctx::connection(ctx);
            let _: Result<(), i32> = LOCAL_FLOWS.remove(key::Probe::new(local, remote));
            if old == BPF_TCP_SYN_SENT {
                // It never came about.
                return;
            }
        }
        let (acked, received) = ctx::byte_counts(ctx);
        let (sent, received) = decide::app_bytes(acked, received, old, dialled.received_at_fin);
        count(counter::DIRECT_CLOSED);
        if let Some(row) = direct_row(&row_key(dialled)) {
            row.closed(sent, received, ctx::quality(ctx));
        }
    }
}

/// The storage of a client whose connection goes without the daemon and is counted here.
#[inline(always)]
fn counted_socket(socket: *mut bpf_sock) -> Option<&'static mut value::SocketFlow> {
    if socket.is_null() {
        return None;
    }
    let dialled = SOCKET_FLOW.of(socket)?;
    let counted = dialled.kind == u32::from(flow::DIRECT) || dialled.kind == u32::from(flow::LOCAL);
    if counted { Some(dialled) } else { None }
}

#[inline(always)]
fn row_key(dialled: &value::SocketFlow) -> key::Direct {
    key::Direct::new(dialled.cookie, dialled.original, dialled.actual, dialled.kind)
}

/// A listener's count.
#[inline(always)]
fn listener(key: &key::Listener) -> Option<Shared> {
    let row = LISTENERS.get_ptr_mut(key)?;
    // SAFETY: a field of a live row; the map is not preallocated, so its memory stays while the program runs.
    Some(Shared(unsafe { &raw mut (*row).count }))
}

/// A row of the statistics.
struct Row(*mut value::Direct);

/// The row of a direct connection, made if need be.
#[inline(always)]
fn direct_row(key: &key::Direct) -> Option<Row> {
    if let Some(row) = DIRECT_STATS.get_ptr_mut(key) {
        return Some(Row(row));
    }
    let empty =
        value::Direct { opened: 0, closed: 0, sent: 0, received: 0, retransmits: 0, rtt_us: 0, rtt_count: 0 };
    // Fails if another CPU was first, which the look-up then finds.
    let _: Result<(), i32> = DIRECT_STATS.insert(key, empty, BPF_NOEXIST as u64);
    match DIRECT_STATS.get_ptr_mut(key) {
        Some(row) => Some(Row(row)),
        None => {
            count(counter::DIRECT_STATS_FULL);
            None
        }
    }
}

impl Row {
    #[inline(always)]
    fn opened(&self, number: i64) {
        // SAFETY: as in `listener`.
        Shared(unsafe { &raw mut (*self.0).opened }).add(number);
    }

    #[inline(always)]
    fn closed(&self, sent: u64, received: u64, (retransmits, rtt_us): (u32, u32)) {
        // SAFETY: as in `listener`.
        let (closed, sent_sum, received_sum) =
            unsafe { (&raw mut (*self.0).closed, &raw mut (*self.0).sent, &raw mut (*self.0).received) };
        Shared(closed).add(1);
        Shared(sent_sum).add(sent as i64);
        Shared(received_sum).add(received as i64);
        // SAFETY: as in `listener`.
        let (retransmits_sum, rtt_sum, rtt_count) = unsafe {
            (&raw mut (*self.0).retransmits, &raw mut (*self.0).rtt_us, &raw mut (*self.0).rtt_count)
        };
        if retransmits > 0 {
            Shared(retransmits_sum).add(i64::from(retransmits));
        }
        if rtt_us > 0 {
            Shared(rtt_sum).add(i64::from(rtt_us));
            Shared(rtt_count).add(1);
        }
    }
}
