//! What one client follows of one type, and what it still has to be sent.

use super::snapshot::{Resource, View};
use super::{Backoff, WILDCARD};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// A resource whose version the client refused.
#[derive(Debug)]
struct Rejected {
    version: Arc<str>,
    times: u32,
    not_before: Instant,
}

/// A response that waits for its answer.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) nonce: String,
    /// Name and version of every resource in it.
    pub(super) sent: Vec<(Arc<str>, Arc<str>)>,
}

/// The state of one type on one stream.
///
/// Invariant: what a client follows is in step with the current view, or named in `pending`, `delayed` or
/// `in_flight`, or was refused in the version that it has now.
#[derive(Debug)]
pub(super) struct Tracked {
    wildcard: bool,
    /// Names and aliases that were subscribed to one by one.
    named: BTreeSet<Arc<str>>,
    pending: BTreeSet<Arc<str>>,
    /// Would be pending, but was refused too often too recently.
    delayed: BTreeMap<Arc<str>, Instant>,
    rejected: BTreeMap<Arc<str>, Rejected>,
    pub(super) in_flight: Option<InFlight>,
    /// A response is due even if it is empty: it tells the client that nothing is missing.
    pub(super) respond: bool,
    backoff: Backoff,
}

impl Tracked {
    pub(super) fn new(backoff: Backoff) -> Self {
        Self {
            wildcard: false,
            named: BTreeSet::new(),
            pending: BTreeSet::new(),
            delayed: BTreeMap::new(),
            rejected: BTreeMap::new(),
            in_flight: None,
            respond: true,
            backoff,
        }
    }

    pub(super) fn names(&self) -> usize {
        self.named.len()
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.delayed.values().min().copied()
    }

    /// The first request of a type: `held` is what the client kept from an earlier stream.
    pub(super) fn start<V: View>(
        &mut self,
        type_url: &str,
        subscribe: &[String],
        held: &HashMap<String, String>,
        view: &V,
    ) {
        self.wildcard = subscribe.is_empty() || subscribe.iter().any(|n| n == WILDCARD);
        self.named = subscribe.iter().filter(|n| *n != WILDCARD).map(|n| n.as_str().into()).collect();
        let has = |r: &Resource| held.get(&*r.name).is_some_and(|v| **v == *r.version);
        if self.wildcard {
            view.for_each(type_url, &mut |r| {
                if !has(r) {
                    self.pending.insert(r.name.clone());
                }
            });
        }
        for name in &self.named {
            let found = view.get(type_url, name).or_else(|| view.by_alias(type_url, name));
            if found.is_none_or(|r| !has(&r)) {
                self.pending.insert(name.clone());
            }
        }
        for name in held.keys() {
            match view.get(type_url, name) {
                // Gone while the client was away, or no longer followed.
                None => _ = self.pending.insert(name.as_str().into()),
                Some(r) if !self.follows(&r) => _ = self.pending.insert(r.name.clone()),
                Some(_) => {}
            }
        }
    }

    /// Later requests. The client forgets what it unsubscribes from, and expects an answer for every name that it
    /// subscribes to, known or not.
    pub(super) fn subscribe<V: View>(&mut self, type_url: &str, names: &[String], view: &V) {
        for name in names {
            if name == WILDCARD {
                if !self.wildcard {
                    self.wildcard = true;
                    self.respond = true;
                    view.for_each(type_url, &mut |r| _ = self.pending.insert(r.name.clone()));
                }
                continue;
            }
            let name: Arc<str> = name.as_str().into();
            self.delayed.remove(&name);
            self.rejected.remove(&name);
            self.pending.insert(name.clone());
            self.named.insert(name);
        }
    }

    pub(super) fn unsubscribe<V: View>(&mut self, type_url: &str, names: &[String], view: &V) {
        for name in names {
            if name == WILDCARD {
                self.wildcard = false;
            } else {
                self.named.remove(name.as_str());
            }
        }
        if self.wildcard {
            // The client dropped these, and still follows them through the wildcard.
            let back = names.iter().filter(|n| view.get(type_url, n).is_some());
            self.pending.extend(back.map(|n| Arc::from(n.as_str())));
            return;
        }
        let followed = |name: &Arc<str>| {
            self.named.contains(name) || view.get(type_url, name).is_some_and(|r| self.follows(&r))
        };
        let pending = self.pending.iter().filter(|n| followed(n)).cloned().collect();
        let delayed =
            self.delayed.iter().filter(|(n, _)| followed(n)).map(|(n, t)| (n.clone(), *t)).collect();
        (self.pending, self.delayed) = (pending, delayed);
    }

    pub(super) fn follows(&self, r: &Resource) -> bool {
        self.wildcard || self.named.contains(&r.name) || r.aliases.iter().any(|a| self.named.contains(a))
    }

    /// The view changed.
    pub(super) fn changed<V: View>(&mut self, type_url: &str, old: &V, new: &V, now: Instant) {
        new.changed_since(old, type_url, &mut |name| {
            let (before, after) = (old.get(type_url, name), new.get(type_url, name));
            let followed = |r: &Option<Arc<Resource>>| r.as_ref().is_some_and(|r| self.follows(r));
            if !followed(&before) && !followed(&after) {
                return;
            }
            let version = |r: &Option<Arc<Resource>>| r.as_ref().map(|r| r.version.clone());
            if version(&before) == version(&after) && followed(&before) == followed(&after) {
                return;
            }
            self.delayed.remove(name);
            match (self.rejected.get(name), &after) {
                (Some(bad), Some(after)) if bad.version == after.version => _ = self.pending.remove(name),
                (Some(bad), Some(_)) if now < bad.not_before => {
                    self.pending.remove(name);
                    self.delayed.insert(name.clone(), bad.not_before);
                }
                _ => _ = self.pending.insert(name.clone()),
            }
        });
    }

    /// Moves what was held back long enough to what is to be sent.
    pub(super) fn release(&mut self, now: Instant) {
        let due: Vec<_> = self.delayed.iter().filter(|(_, t)| **t <= now).map(|(n, _)| n.clone()).collect();
        for name in due {
            self.delayed.remove(&name);
            self.pending.insert(name);
        }
    }

    pub(super) fn take_pending(&mut self) -> Option<Arc<str>> {
        self.pending.pop_first()
    }

    pub(super) fn put_back(&mut self, name: Arc<str>) {
        self.pending.insert(name);
    }

    /// Everything of a response was applied.
    pub(super) fn accepted(&mut self, sent: &[(Arc<str>, Arc<str>)]) {
        if self.rejected.is_empty() {
            return;
        }
        for (name, _) in sent {
            self.rejected.remove(name);
        }
    }

    /// A resource is gone; so is what was said about it.
    pub(super) fn forget(&mut self, name: &str) {
        self.rejected.remove(name);
    }

    /// One resource of a response was refused: it stays away until it changes, and if it changes soon, for a while.
    /// `current` is its version now.
    pub(super) fn refused(&mut self, name: Arc<str>, version: Arc<str>, current: Option<&str>, now: Instant) {
        let times = self.rejected.get(&name).map_or(0, |r| r.times).saturating_add(1);
        let not_before = now + self.backoff.delay(times);
        // Another version may be waiting already. A removal is not held back.
        if current.is_some() && self.pending.remove(&name) && current != Some(&*version) {
            self.delayed.insert(name.clone(), not_before);
        }
        self.rejected.insert(name, Rejected { version, times, not_before });
    }
}
