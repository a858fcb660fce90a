//! Plaintext connections that sk_lookup steered to podIP:15006.
//!
//! Also connections between pods of this node that the kernel had begun to carry when their verdict ended: they have no
//! TLS either, but the kernel knows their client.

use super::{Inbound, Permit, leads_back};
use crate::{
    l4::TcpEnd,
    local::{LocalPod, SettingUp},
    metrics::{Direction, Security},
    net,
    outcome::{Connection, End, Ends, chain},
};
use std::{net::SocketAddr, sync::Arc};
use tokio::net::TcpStream;

impl Inbound {
    /// Serves one connection. Its local address is what the client dialled: the kernel steered it here without
    /// changing it.
    pub async fn plain(&self, pod: Arc<LocalPod>, stream: TcpStream, client: SocketAddr, begun: SettingUp) {
        let ends = Ends {
            client: Some(client),
            source: self.client_workload(client),
            destination: self.workload(&pod),
            destination_id: None,
            server: stream.local_addr().ok(),
            security: Security::None,
            ..Ends::default()
        };
        let mut record = Connection::begin(self.metrics.clone(), Direction::Inbound, ends);
        let (end, sent, received) = self.plain_inner(&mut record, pod, stream, client, begun).await;
        record.finish(&end, sent, received);
    }

    async fn plain_inner(
        &self,
        record: &mut Connection,
        pod: Arc<LocalPod>,
        stream: TcpStream,
        client: SocketAddr,
        begun: SettingUp,
    ) -> (End, u64, u64) {
        let refuse = |stream: &TcpStream, flags, reason, text: String| {
            // A reset, as from a closed port: a plain close would look like a server that hung up.
            net::reset_on_close(stream);
            (End::refused(flags, reason, text), 0, 0)
        };
        let Some(to) = record.ends.server else {
            return refuse(&stream, "DPE", "no_original_destination", "the socket is gone".to_owned());
        };
        if leads_back(to) || !pod.addrs.contains(&to.ip()) {
            return refuse(&stream, "DPE", "own_port", format!("{to} is a port of the mesh itself"));
        }
        let _slot = match pod.limits.slot(2) {
            Ok(slot) => slot,
            Err(limit) => {
                let text = format!("the limit on {} of the pod is reached", limit.label());
                return refuse(&stream, "UO", "overloaded", text);
            }
        };
        let source = self.local_client(client, to);
        if let Some(source) = &source {
            record.ends.security = Security::NodeLocal;
            record.ends.source_id = Some(source.identity.clone());
            record.ends.destination_id = Some(pod.identity.clone());
        }
        let permit = match Permit::check(&pod, record.ends.source_id.as_ref(), client, to) {
            Ok(permit) => permit,
            Err(denied) => {
                let reason = if denied.plaintext { "plaintext_under_strict" } else { "denied" };
                return refuse(&stream, "RBAC", reason, denied.to_string());
            }
        };
        let server = match self.dial(&permit).await {
            Ok(server) => server,
            Err(error) => return refuse(&stream, "UF", "unavailable", chain(&error)),
        };
        record.opened();
        drop(begun);
        let (outcome, end) = self.splice(TcpEnd::new(stream), server, permit).await;
        (end, outcome.received, outcome.sent)
    }
}
