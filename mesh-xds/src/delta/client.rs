//! The client's half of delta discovery, across streams.
//!
//! It remembers by name which version of a resource was applied, so that after a reconnect the server sends what
//! changed and nothing else. A response is acknowledged after it was applied. A refused resource is named in the
//! NACK, and the version that is reported for it stays the last one that was applied. When a server repeats a
//! version that was refused before, the answer is given ever later: servers of this protocol wait for it, so bad
//! configuration cannot make a hot loop. What a former process kept on disk can be told to it before the first stream,
//! and is then resumed like any other. Deliberately absent: the resources themselves; who applies them keeps them.

use super::{Backoff, PARTIAL, REJECTIONS_TYPE, WILDCARD};
use crate::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::wire::{Any, core::Node, nodemesh, rpc};
use prost::Message;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// gRPC's INVALID_ARGUMENT.
const INVALID_ARGUMENT: i32 = 3;
/// Rejections that a NACK spells out; the rest is counted.
const NACK_NAMES: usize = 1_000;
/// Bytes of the message of a NACK, about.
const NACK_BYTES: usize = 4_096;

/// Bounds of a client.
#[derive(Clone, Debug)]
pub struct ClientLimits {
    /// Resources held of one type; more are refused.
    pub resources: usize,
    /// Bytes of a resource's name; longer ones are refused.
    pub name_bytes: usize,
    /// How long the answer waits when a refused version comes again.
    pub nack_backoff: Backoff,
}

impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            resources: 1_000_000,
            name_bytes: 1_024,
            // While an answer waits, good changes of the same type wait too: not for long.
            nack_backoff: Backoff { initial: Duration::from_millis(200), max: Duration::from_secs(10) },
        }
    }
}

/// What to follow from the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// The type.
    pub type_url: String,
    /// Everything of that type.
    pub wildcard: bool,
    /// Names (or aliases), besides or instead.
    pub names: BTreeSet<String>,
}

impl Subscription {
    /// Everything of a type.
    pub fn all(type_url: &str) -> Self {
        Self { type_url: type_url.to_owned(), wildcard: true, names: BTreeSet::new() }
    }

    /// Nothing yet: names follow on demand.
    pub fn on_demand(type_url: &str) -> Self {
        Self { type_url: type_url.to_owned(), wildcard: false, names: BTreeSet::new() }
    }
}

/// A resource as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// Its content.
    pub body: Any,
}

/// Why one resource is not applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The resource's name.
    pub name: String,
    /// For people.
    pub reason: String,
}

/// Changes to apply, as one unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The type.
    pub type_url: String,
    /// New and changed resources; no name comes twice.
    pub resources: Vec<Received>,
    /// Names of resources that are gone, or that were asked for and do not exist.
    pub removed: Vec<String>,
    /// More follows at once.
    pub partial: bool,
}

impl Changes {
    /// None, of a type.
    pub fn of_type(type_url: String) -> Self {
        Self { type_url, resources: Vec::new(), removed: Vec::new(), partial: false }
    }
}

/// Changes, and what stands for them until they are applied.
#[derive(Debug)]
pub struct Update {
    /// What to apply.
    pub changes: Changes,
    /// To be given back with the result.
    pub ticket: Ticket,
}

/// Stands for an update that is being applied.
#[derive(Debug)]
pub struct Ticket {
    stream: u64,
    type_index: usize,
    nonce: String,
    versions: Vec<(String, String)>,
    removed: Vec<String>,
    refused: Vec<Rejection>,
    partial: bool,
}

/// Why a response cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// Not subscribed to.
    #[error("the server sent {type_url:?}, which was not asked for; the response is ignored")]
    UnknownType {
        /// The type.
        type_url: String,
    },
    /// It could not be acknowledged.
    #[error("the server sent a response for {type_url} without a nonce; the response is ignored")]
    NoNonce {
        /// The type.
        type_url: String,
    },
    /// It came twice.
    #[error("the server sent response {nonce:?} for {type_url} again; the copy is ignored")]
    Repeated {
        /// The type.
        type_url: String,
        /// The nonce.
        nonce: String,
    },
    /// It came before the first request or after the end of a stream.
    #[error("a response for {type_url} came outside of a stream; it is ignored")]
    NotConnected {
        /// The type.
        type_url: String,
    },
}

#[derive(Debug)]
struct TypeState {
    type_url: String,
    wildcard: bool,
    names: BTreeSet<String>,
    /// Applied versions by name.
    held: HashMap<String, String>,
    /// Refused versions by name.
    refused: HashMap<String, String>,
    /// NACKs in a row that named nothing new.
    repeated_nacks: u32,
    last_nonce: String,
    /// A NACK that waits for its time.
    delayed: Option<(Instant, DeltaDiscoveryRequest)>,
    started: bool,
    synced: bool,
    /// The server has said on this stream all that it had to say when the stream began.
    current: bool,
}

/// The client's state, for as many streams as it takes.
#[derive(Debug)]
pub struct DeltaClient {
    node: Node,
    limits: ClientLimits,
    types: Vec<TypeState>,
    stream: u64,
    connected: bool,
    nacks: u64,
}

impl DeltaClient {
    /// A client that is not connected yet. A type that is named twice is followed once, with all its names.
    pub fn new(node: Node, limits: ClientLimits, subscriptions: Vec<Subscription>) -> Self {
        let mut types: Vec<TypeState> = Vec::new();
        for s in subscriptions {
            if let Some(known) = types.iter_mut().find(|t| t.type_url == s.type_url) {
                known.wildcard |= s.wildcard;
                known.names.extend(s.names);
                continue;
            }
            types.push(TypeState {
                type_url: s.type_url,
                wildcard: s.wildcard,
                names: s.names,
                held: HashMap::new(),
                refused: HashMap::new(),
                repeated_nacks: 0,
                last_nonce: String::new(),
                delayed: None,
                started: false,
                synced: false,
                current: false,
            });
        }
        Self { node, limits, types, stream: 0, connected: false, nacks: 0 }
    }

    /// A new stream is there: what to send on it.
    pub fn connected(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.stream += 1;
        self.connected = true;
        let node = &self.node;
        let mut requests: Vec<_> = self.types.iter_mut().map(first_request).collect();
        if let Some(first) = requests.first_mut() {
            first.node = Some(node.clone());
        }
        requests
    }

    /// The stream is gone. What was applied stays.
    pub fn disconnected(&mut self) {
        self.connected = false;
        for t in &mut self.types {
            t.delayed = None;
            t.started = false;
            t.current = false;
            t.last_nonce.clear();
        }
    }

    /// Whether everything that the server had when the first stream began was applied. Stays true afterwards: an old
    /// configuration is better than none.
    pub fn synced(&self) -> bool {
        self.types.iter().all(|t| t.synced)
    }

    /// Whether what is applied is what the server has now: on this stream, it has said everything at least once.
    pub fn current(&self) -> bool {
        self.connected && self.types.iter().all(|t| t.current)
    }

    /// Resources that were applied from elsewhere, for example from disk: the next stream begins with these versions, so
    /// that the server sends what differs from them, and removes what it does not have. To be called between streams.
    pub fn restored(&mut self, type_url: &str, versions: impl IntoIterator<Item = (String, String)>) {
        let limit = self.limits.resources;
        if let Some(t) = self.types.iter_mut().find(|t| t.type_url == type_url) {
            for (name, version) in versions.into_iter().take(limit) {
                t.held.insert(name, version);
            }
        }
    }

    /// NACKs sent or waiting to be sent, ever.
    pub fn nacks(&self) -> u64 {
        self.nacks
    }

    /// Names and applied versions of a type.
    pub fn held(&self, type_url: &str) -> impl Iterator<Item = (&str, &str)> {
        let t = self.types.iter().find(|t| t.type_url == type_url);
        t.into_iter().flat_map(|t| t.held.iter().map(|(n, v)| (n.as_str(), v.as_str())))
    }

    /// The names that are followed one by one.
    pub fn names(&self, type_url: &str) -> BTreeSet<String> {
        let t = self.types.iter().find(|t| t.type_url == type_url);
        t.map(|t| t.names.clone()).unwrap_or_default()
    }

    /// Follows more names. The server answers for each, if only with its removal.
    pub fn subscribe(&mut self, type_url: &str, names: &[String]) -> Option<DeltaDiscoveryRequest> {
        let connected = self.connected;
        let t = self.types.iter_mut().find(|t| t.type_url == type_url)?;
        t.names.extend(names.iter().cloned());
        (connected && t.started && !names.is_empty()).then(|| DeltaDiscoveryRequest {
            type_url: t.type_url.clone(),
            resource_names_subscribe: names.to_vec(),
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Stops following names. The caller drops the resources.
    pub fn unsubscribe(&mut self, type_url: &str, names: &[String]) -> Option<DeltaDiscoveryRequest> {
        let connected = self.connected;
        let t = self.types.iter_mut().find(|t| t.type_url == type_url)?;
        for name in names {
            t.names.remove(name);
            t.held.remove(name);
            t.refused.remove(name);
        }
        (connected && t.started && !names.is_empty()).then(|| DeltaDiscoveryRequest {
            type_url: t.type_url.clone(),
            resource_names_unsubscribe: names.to_vec(),
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// A response came: what to apply.
    pub fn response(&mut self, response: DeltaDiscoveryResponse) -> Result<Update, ClientError> {
        let type_url = response.type_url;
        let Some(type_index) = self.types.iter().position(|t| t.type_url == type_url) else {
            return Err(ClientError::UnknownType { type_url });
        };
        if response.nonce.is_empty() {
            return Err(ClientError::NoNonce { type_url });
        }
        let t = &mut self.types[type_index];
        if !self.connected || !t.started {
            return Err(ClientError::NotConnected { type_url });
        }
        if t.last_nonce == response.nonce {
            return Err(ClientError::Repeated { type_url, nonce: response.nonce });
        }
        t.last_nonce.clone_from(&response.nonce);
        let mut refused = Vec::new();
        let mut resources: Vec<Received> = Vec::with_capacity(response.resources.len());
        let mut seen: HashSet<String> = HashSet::with_capacity(response.resources.len());
        let mut count = t.held.len();
        for r in response.resources {
            // Without content it only prolongs a time to live, which is not used here.
            let Some(body) = r.resource else { continue };
            // On its way when it was unsubscribed from: the caller has dropped it and must not get it back.
            if !t.wildcard && !t.names.contains(&r.name) && !r.aliases.iter().any(|a| t.names.contains(a)) {
                continue;
            }
            if let Err(reason) = admit(&r.name, &t.held, &mut seen, &mut count, &self.limits) {
                refused.push(Rejection { name: r.name.chars().take(128).collect(), reason });
                continue;
            }
            resources.push(Received { name: r.name, version: r.version, aliases: r.aliases, body });
        }
        let partial = response.system_version_info.ends_with(PARTIAL);
        let ticket = Ticket {
            stream: self.stream,
            type_index,
            nonce: response.nonce,
            versions: resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect(),
            removed: response.removed_resources.clone(),
            refused,
            partial,
        };
        let changes = Changes { type_url, resources, removed: response.removed_resources, partial };
        Ok(Update { changes, ticket })
    }

    /// An update was applied but for these resources. Gives the answer to send now, if any; a later one comes from
    /// [`tick`](Self::tick).
    pub fn applied(
        &mut self,
        ticket: Ticket,
        rejections: Vec<Rejection>,
        now: Instant,
    ) -> Option<DeltaDiscoveryRequest> {
        let same_stream = self.connected && ticket.stream == self.stream;
        let t = self.types.get_mut(ticket.type_index)?;
        let total = ticket.versions.len() + ticket.refused.len();
        let mut rejections = rejections;
        rejections.extend(ticket.refused);
        let bad: HashSet<&str> = rejections.iter().map(|r| r.name.as_str()).collect();
        // Whether every refused version was refused before: then nothing has improved.
        let mut repeated = true;
        for (name, version) in ticket.versions {
            if bad.contains(name.as_str()) {
                repeated &= t.refused.get(&name) == Some(&version);
                t.refused.insert(name, version);
            } else {
                t.refused.remove(&name);
                t.held.insert(name, version);
            }
        }
        for name in &ticket.removed {
            t.held.remove(name);
            t.refused.remove(name);
        }
        t.synced |= !ticket.partial;
        t.current |= !ticket.partial && same_stream;
        let mut answer = DeltaDiscoveryRequest {
            type_url: t.type_url.clone(),
            response_nonce: ticket.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        if rejections.is_empty() {
            t.repeated_nacks = 0;
            return same_stream.then_some(answer);
        }
        self.nacks += 1;
        t.repeated_nacks = if repeated { t.repeated_nacks.saturating_add(1) } else { 0 };
        if !same_stream {
            return None;
        }
        answer.error_detail = Some(status(&rejections, total));
        let delay = self.limits.nack_backoff.delay(t.repeated_nacks);
        if delay.is_zero() {
            return Some(answer);
        }
        t.delayed = Some((now + delay, answer));
        None
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn next_tick(&self) -> Option<Instant> {
        self.types.iter().filter_map(|t| t.delayed.as_ref()).map(|(at, _)| *at).min()
    }

    /// Answers whose time has come.
    pub fn tick(&mut self, now: Instant) -> Vec<DeltaDiscoveryRequest> {
        self.types
            .iter_mut()
            .filter_map(|t| t.delayed.take_if(|(at, _)| *at <= now))
            .map(|(_, answer)| answer)
            .collect()
    }
}

fn first_request(t: &mut TypeState) -> DeltaDiscoveryRequest {
    t.started = true;
    let mut subscribe: Vec<String> = t.names.iter().cloned().collect();
    let mut unsubscribe = Vec::new();
    match (t.wildcard, t.names.is_empty()) {
        // An empty list in the first request is the wildcard; next to names it has to be spelt out.
        (true, false) => subscribe.insert(0, WILDCARD.to_owned()),
        // The protocol has no other way to begin with nothing.
        (false, true) => {
            subscribe.push(WILDCARD.to_owned());
            unsubscribe.push(WILDCARD.to_owned());
        }
        _ => {}
    }
    DeltaDiscoveryRequest {
        type_url: t.type_url.clone(),
        resource_names_subscribe: subscribe,
        resource_names_unsubscribe: unsubscribe,
        initial_resource_versions: t.held.clone(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn admit(
    name: &str,
    held: &HashMap<String, String>,
    seen: &mut HashSet<String>,
    count: &mut usize,
    limits: &ClientLimits,
) -> Result<(), String> {
    if name.is_empty() {
        return Err("the resource has no name; set it".to_owned());
    }
    if name.len() > limits.name_bytes {
        return Err(format!("the name has {} bytes; at most {} are taken", name.len(), limits.name_bytes));
    }
    if !seen.insert(name.to_owned()) {
        return Err("the name comes twice in one response; send it once".to_owned());
    }
    if !held.contains_key(name) {
        if *count >= limits.resources {
            return Err(format!("this node takes at most {} resources of one type", limits.resources));
        }
        *count += 1;
    }
    Ok(())
}

fn status(rejections: &[Rejection], total: usize) -> rpc::Status {
    let mut message = format!("{} of {total} resources refused", rejections.len());
    let mut told = 0;
    for r in rejections {
        if message.len() > NACK_BYTES {
            break;
        }
        // Writing to a String cannot fail.
        let _ = write!(message, "{} {}: {}", if told == 0 { ":" } else { ";" }, r.name, r.reason);
        told += 1;
    }
    if told < rejections.len() {
        let _ = write!(message, "; and {} more", rejections.len() - told);
    }
    let list = nodemesh::Rejections {
        rejections: rejections
            .iter()
            .take(NACK_NAMES)
            .map(|r| nodemesh::Rejection { name: r.name.clone(), reason: r.reason.clone() })
            .collect(),
    };
    let details = Any { type_url: REJECTIONS_TYPE.to_owned(), value: list.encode_to_vec().into() };
    rpc::Status { code: INVALID_ARGUMENT, message, details: vec![details] }
}
