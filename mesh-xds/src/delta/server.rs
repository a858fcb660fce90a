//! The server's half of one delta stream.
//!
//! Per type there is at most one response without an answer, so a slow client slows down itself and nothing else:
//! what changes in the meantime is gathered by name and sent once, in its latest version. A refused version is not
//! sent again; a refused resource that keeps changing is sent ever less often. Deliberately absent: timeouts (the
//! transport's keep-alive finds dead clients) and knowledge of what the types mean.

use super::snapshot::View;
use super::subscription::{InFlight, Tracked};
use super::{Backoff, PARTIAL, REJECTIONS_TYPE};
use crate::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource};
use crate::wire::{core::ControlPlane, nodemesh::Rejections, rpc};
use prost::Message;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is kept of the message of a NACK; it is logged.
const NACK_CHARS: usize = 4_096;

/// Bounds of one stream.
#[derive(Clone, Debug)]
pub struct ServerLimits {
    /// Bytes of resources in a response; a single larger resource is sent alone.
    pub response_bytes: usize,
    /// Resources and removals in a response.
    pub response_resources: usize,
    /// Names that a client may subscribe to one by one, per type.
    pub subscriptions: usize,
    /// Bytes of a subscribed name.
    pub name_bytes: usize,
    /// Types on a stream.
    pub types: usize,
    /// How long a refused resource that changes is held back.
    pub nack_backoff: Backoff,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            // Well below the 200 MiB that ztunnel takes, and large enough that a big mesh is one response: a stock
            // client believes that it knows everything after the first.
            response_bytes: 64 << 20,
            response_resources: 200_000,
            subscriptions: 100_000,
            name_bytes: 1_024,
            types: 16,
            nack_backoff: Backoff { initial: Duration::from_secs(1), max: Duration::from_mins(5) },
        }
    }
}

/// Why a stream has to end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Delta requests say which type they are about.
    #[error("a delta request has no type_url; set it")]
    NoType,
    /// Too many types.
    #[error("the stream asks for more than {limit} resource types; open another stream")]
    Types {
        /// The bound.
        limit: usize,
    },
    /// Too many names.
    #[error("the stream subscribes to more than {limit} names of {type_url}; subscribe to \"*\" instead")]
    Subscriptions {
        /// The type.
        type_url: String,
        /// The bound.
        limit: usize,
    },
    /// A name that is too long.
    #[error("a subscribed name of {type_url} has {len} bytes; at most {limit} are served")]
    Name {
        /// The type.
        type_url: String,
        /// Its length.
        len: usize,
        /// The bound.
        limit: usize,
    },
}

/// What a request said about an earlier response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: it was about subscriptions.
    None,
    /// It answers a response that is not the latest; ignored.
    Stale,
    /// All of it was applied.
    Ack,
    /// Some of it was refused.
    Nack {
        /// The client's own words, cut to a bounded length.
        message: String,
        /// The refused resources, if the client names them in the way of nodemesh; otherwise all of the response.
        names: Vec<Arc<str>>,
    },
}

/// The state of one stream. `V` is what this client may see.
pub struct DeltaServer<V> {
    limits: ServerLimits,
    view: Arc<V>,
    types: BTreeMap<String, Tracked>,
    nonces: u64,
    identifier: String,
}

impl<V: View> DeltaServer<V> {
    /// A new stream. `identifier` names the server, for people.
    pub fn new(limits: ServerLimits, view: Arc<V>, identifier: &str) -> Self {
        Self { limits, view, types: BTreeMap::new(), nonces: 0, identifier: identifier.to_owned() }
    }

    /// A message of the client.
    pub fn request(
        &mut self,
        request: &DeltaDiscoveryRequest,
        now: Instant,
    ) -> Result<Answer, ProtocolError> {
        self.check(request)?;
        let type_url = request.type_url.as_str();
        let (subscribe, unsubscribe) =
            (&request.resource_names_subscribe, &request.resource_names_unsubscribe);
        let answer = match self.types.get_mut(type_url) {
            None => {
                let mut tracked = Tracked::new(self.limits.nack_backoff);
                tracked.start(type_url, subscribe, &request.initial_resource_versions, &*self.view);
                tracked.unsubscribe(type_url, unsubscribe, &*self.view);
                self.types.insert(type_url.to_owned(), tracked);
                // A nonce in the first request belongs to a stream that is gone.
                if request.response_nonce.is_empty() { Answer::None } else { Answer::Stale }
            }
            Some(tracked) => {
                let answer = answer(tracked, request, &*self.view, now);
                if !subscribe.is_empty() {
                    tracked.subscribe(type_url, subscribe, &*self.view);
                }
                if !unsubscribe.is_empty() {
                    tracked.unsubscribe(type_url, unsubscribe, &*self.view);
                }
                answer
            }
        };
        let limit = self.limits.subscriptions;
        if self.types.get(type_url).is_some_and(|t| t.names() > limit) {
            return Err(ProtocolError::Subscriptions { type_url: type_url.to_owned(), limit });
        }
        Ok(answer)
    }

    fn check(&self, request: &DeltaDiscoveryRequest) -> Result<(), ProtocolError> {
        let type_url = &request.type_url;
        if type_url.is_empty() {
            return Err(ProtocolError::NoType);
        }
        if !self.types.contains_key(type_url) && self.types.len() >= self.limits.types {
            return Err(ProtocolError::Types { limit: self.limits.types });
        }
        let limit = self.limits.name_bytes;
        match request.resource_names_subscribe.iter().map(String::len).find(|len| *len > limit) {
            Some(len) => Err(ProtocolError::Name { type_url: type_url.clone(), len, limit }),
            None => Ok(()),
        }
    }

    /// The world changed.
    pub fn update(&mut self, view: Arc<V>, now: Instant) {
        for (type_url, tracked) in &mut self.types {
            tracked.changed(type_url, &*self.view, &*view, now);
        }
        self.view = view;
    }

    /// The next response to send, if one may be sent now. To be called until there is none.
    pub fn poll(&mut self, now: Instant) -> Option<DeltaDiscoveryResponse> {
        let (type_url, tracked) = self.types.iter_mut().find_map(|(type_url, t)| {
            if t.in_flight.is_some() {
                return None;
            }
            t.release(now);
            (t.respond || t.has_pending()).then_some((type_url, t))
        })?;
        self.nonces += 1;
        let nonce = format!("{:x}", self.nonces);
        let mut response = DeltaDiscoveryResponse {
            system_version_info: self.view.generation().to_string(),
            type_url: type_url.clone(),
            nonce: nonce.clone(),
            control_plane: Some(ControlPlane { identifier: self.identifier.clone() }),
            ..DeltaDiscoveryResponse::default()
        };
        let sent = fill(&mut response, tracked, &*self.view, &self.limits);
        if tracked.has_pending() {
            response.system_version_info.push(PARTIAL);
        }
        tracked.respond = false;
        tracked.in_flight = Some(InFlight { nonce, sent });
        Some(response)
    }

    /// When to call [`poll`](Self::poll) next even if nothing happens.
    pub fn next_wakeup(&self) -> Option<Instant> {
        self.types.values().filter(|t| t.in_flight.is_none()).filter_map(Tracked::next_due).min()
    }

    /// Responses that wait for an answer.
    pub fn in_flight(&self) -> usize {
        self.types.values().filter(|t| t.in_flight.is_some()).count()
    }
}

/// Moves pending names into a response, up to its bounds.
fn fill<V: View>(
    response: &mut DeltaDiscoveryResponse,
    tracked: &mut Tracked,
    view: &V,
    limits: &ServerLimits,
) -> Vec<(Arc<str>, Arc<str>)> {
    let mut sent = Vec::new();
    let mut seen: HashSet<Arc<str>> = HashSet::new();
    let mut bytes = 0;
    while sent.len() + response.removed_resources.len() < limits.response_resources {
        let Some(name) = tracked.take_pending() else { break };
        let found = view.get(&response.type_url, &name);
        let found = found.or_else(|| view.by_alias(&response.type_url, &name));
        let Some(resource) = found.filter(|r| tracked.follows(r)) else {
            tracked.forget(&name);
            response.removed_resources.push(name.to_string());
            continue;
        };
        // A name and an alias of one resource may both be pending.
        if seen.contains(&resource.name) {
            continue;
        }
        if bytes > 0 && bytes + resource.size() > limits.response_bytes {
            tracked.put_back(name);
            break;
        }
        bytes += resource.size();
        seen.insert(resource.name.clone());
        sent.push((resource.name.clone(), resource.version.clone()));
        response.resources.push(WireResource {
            version: resource.version.to_string(),
            resource: Some(resource.body.clone()),
            name: resource.name.to_string(),
            aliases: resource.aliases.iter().map(ToString::to_string).collect(),
            ttl: None,
        });
    }
    sent
}

fn answer<V: View>(tracked: &mut Tracked, request: &DeltaDiscoveryRequest, view: &V, now: Instant) -> Answer {
    if request.response_nonce.is_empty() {
        return Answer::None;
    }
    let Some(in_flight) = tracked.in_flight.take_if(|f| f.nonce == request.response_nonce) else {
        return Answer::Stale;
    };
    let Some(error) = &request.error_detail else {
        tracked.accepted(&in_flight.sent);
        return Answer::Ack;
    };
    let (refused, fine) = split(in_flight.sent, error);
    tracked.accepted(&fine);
    let names = refused.iter().map(|(name, _)| name.clone()).collect();
    for (name, version) in refused {
        let current = view.get(&request.type_url, &name);
        tracked.refused(name, version, current.as_ref().map(|r| &*r.version), now);
    }
    Answer::Nack { message: error.message.chars().take(NACK_CHARS).collect(), names }
}

type Sent = Vec<(Arc<str>, Arc<str>)>;

/// Which resources of a response a NACK means: those it names in its details, or all, if it names none of them.
fn split(sent: Sent, error: &rpc::Status) -> (Sent, Sent) {
    let named: HashSet<String> = error
        .details
        .iter()
        .filter(|any| any.type_url == REJECTIONS_TYPE)
        .filter_map(|any| Rejections::decode(any.value.clone()).ok())
        .flat_map(|r| r.rejections)
        .map(|r| r.name)
        .collect();
    let (refused, fine): (Sent, Sent) = sent.into_iter().partition(|(name, _)| named.contains(&**name));
    if refused.is_empty() { (fine, refused) } else { (refused, fine) }
}
