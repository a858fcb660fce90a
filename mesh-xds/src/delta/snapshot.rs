//! What a server serves: immutable snapshots that share what did not change.
//!
//! A table is cut into shards by name. An edit copies the shards that it touches and no others, and two snapshots
//! are compared shard by shard, by pointer first: with 100,000 resources a change of one copies a few hundred
//! entries, and finding it means a few hundred pointer comparisons. Deliberately absent: a log of changes, which
//! would have to be bounded and could then be outrun by a slow stream.

use crate::wire::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

const SHARDS: usize = 512;

/// Who may see a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Audience {
    /// Every client.
    #[default]
    Everyone,
    /// Clients that understand nodemesh's extensions; a stock ztunnel would misread the resource.
    Nodemesh,
}

/// One encoded resource. Its version is a hash of its content: equal content is never sent twice, also not after
/// a restart of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Unique within its type.
    pub name: Arc<str>,
    /// Opaque to clients.
    pub version: Arc<str>,
    /// Other names that find it, not unique.
    pub aliases: Vec<Arc<str>>,
    /// Who may see it.
    pub audience: Audience,
    /// The content. Clones share it.
    pub body: Any,
}

impl Resource {
    /// Puts a resource together and computes its version.
    pub fn new(name: &str, aliases: Vec<String>, body: Any) -> Self {
        Self {
            name: name.into(),
            version: version(&body).into(),
            aliases: aliases.into_iter().map(Arc::from).collect(),
            audience: Audience::Everyone,
            body,
        }
    }

    /// The same for a narrower audience.
    pub fn for_audience(mut self, audience: Audience) -> Self {
        self.audience = audience;
        self
    }

    /// About how many bytes it takes in a response.
    pub(super) fn size(&self) -> usize {
        let aliases: usize = self.aliases.iter().map(|a| a.len() + 4).sum();
        self.body.value.len() + self.body.type_url.len() + self.name.len() + self.version.len() + aliases + 32
    }
}

/// 128 bits of SipHash. Not a defence against somebody who looks for collisions on purpose: whoever may write an
/// object may change it in an honest way too.
fn version(body: &Any) -> String {
    let mut text = String::with_capacity(32);
    for salt in [0u8, 1] {
        let mut hasher = DefaultHasher::new();
        (salt, &body.type_url, &body.value[..]).hash(&mut hasher);
        // Writing to a String cannot fail.
        let _ = write!(text, "{:016x}", hasher.finish());
    }
    text
}

/// What one client is served from. Implementations are immutable.
pub trait View: Send + Sync + 'static {
    /// Grows with every change; for people and for clients' logs.
    fn generation(&self) -> u64;
    /// A resource by its own name.
    fn get(&self, type_url: &str, name: &str) -> Option<Arc<Resource>>;
    /// A resource by one of its aliases; the first by name if there are several.
    fn by_alias(&self, type_url: &str, alias: &str) -> Option<Arc<Resource>>;
    /// Every resource of a type, in no particular order.
    fn for_each(&self, type_url: &str, f: &mut dyn FnMut(&Arc<Resource>));
    /// Names that may differ from an older view of the same client: at least every name that does.
    fn changed_since(&self, older: &Self, type_url: &str, f: &mut dyn FnMut(&Arc<str>));
}

type Shard<V> = Arc<BTreeMap<Arc<str>, V>>;

#[derive(Clone)]
struct Sharded<V>(Vec<Shard<V>>);

impl<V: Clone> Sharded<V> {
    fn new() -> Self {
        Self(vec![Arc::default(); SHARDS])
    }

    fn index(key: &str) -> usize {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        // The remainder is below SHARDS on every platform.
        (hasher.finish() % SHARDS as u64) as usize
    }

    fn get(&self, key: &str) -> Option<&V> {
        self.0[Self::index(key)].get(key)
    }

    fn shard_mut(&mut self, key: &str) -> &mut BTreeMap<Arc<str>, V> {
        Arc::make_mut(&mut self.0[Self::index(key)])
    }
}

#[derive(Clone)]
struct Table {
    resources: Sharded<Arc<Resource>>,
    /// Alias to the names of the resources that have it.
    aliases: Sharded<BTreeSet<Arc<str>>>,
    len: usize,
}

impl Table {
    fn new() -> Self {
        Self { resources: Sharded::new(), aliases: Sharded::new(), len: 0 }
    }

    fn put(&mut self, resource: &Arc<Resource>) -> bool {
        let name = resource.name.clone();
        if self.resources.get(&name).is_some_and(|old| old == resource) {
            return false;
        }
        for alias in &resource.aliases {
            self.aliases.shard_mut(alias).entry(alias.clone()).or_default().insert(name.clone());
        }
        match self.resources.shard_mut(&name).insert(name, resource.clone()) {
            Some(old) => self.drop_aliases(&old, Some(resource)),
            None => self.len += 1,
        }
        true
    }

    fn remove(&mut self, name: &str) -> bool {
        if self.resources.get(name).is_none() {
            return false;
        }
        if let Some(old) = self.resources.shard_mut(name).remove(name) {
            self.len -= 1;
            self.drop_aliases(&old, None);
        }
        true
    }

    fn drop_aliases(&mut self, old: &Resource, kept: Option<&Resource>) {
        for alias in old.aliases.iter().filter(|a| kept.is_none_or(|k| !k.aliases.contains(a))) {
            let shard = self.aliases.shard_mut(alias);
            if let Some(names) = shard.get_mut(alias) {
                names.remove(&old.name);
                if names.is_empty() {
                    shard.remove(alias);
                }
            }
        }
    }
}

/// All resources of all types at one moment. Cheap to clone and to edit.
#[derive(Clone, Default)]
pub struct Snapshot {
    generation: u64,
    types: BTreeMap<Arc<str>, Table>,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: BTreeMap<_, _> = self.types.iter().map(|(t, table)| (t, table.len)).collect();
        f.debug_struct("Snapshot").field("generation", &self.generation).field("resources", &sizes).finish()
    }
}

impl Snapshot {
    /// Starts a changed copy.
    pub fn edit(&self) -> SnapshotEdit {
        SnapshotEdit { snapshot: self.clone(), changed: false }
    }

    /// How many resources there are of a type.
    pub fn len(&self, type_url: &str) -> usize {
        self.types.get(type_url).map_or(0, |t| t.len)
    }

    /// Whether there are no resources at all.
    pub fn is_empty(&self) -> bool {
        self.types.values().all(|t| t.len == 0)
    }

    fn find_alias(
        &self,
        type_url: &str,
        alias: &str,
        keep: impl Fn(&Resource) -> bool,
    ) -> Option<Arc<Resource>> {
        let table = self.types.get(type_url)?;
        let names = table.aliases.get(alias)?;
        names.iter().filter_map(|n| table.resources.get(n)).find(|r| keep(r)).cloned()
    }
}

/// A snapshot in the making.
#[derive(Debug)]
pub struct SnapshotEdit {
    snapshot: Snapshot,
    changed: bool,
}

impl SnapshotEdit {
    /// Adds or replaces a resource; false if it was there already, equal in every part.
    pub fn put(&mut self, type_url: &str, resource: impl Into<Arc<Resource>>) -> bool {
        let resource = &resource.into();
        let types = &mut self.snapshot.types;
        let changed = match types.get_mut(type_url) {
            Some(table) => table.put(resource),
            None => types.entry(type_url.into()).or_insert_with(Table::new).put(resource),
        };
        self.changed |= changed;
        changed
    }

    /// Removes a resource; false if it was not there.
    pub fn remove(&mut self, type_url: &str, name: &str) -> bool {
        let changed = self.snapshot.types.get_mut(type_url).is_some_and(|t| t.remove(name));
        self.changed |= changed;
        changed
    }

    /// Whether anything changed so far.
    pub fn changed(&self) -> bool {
        self.changed
    }

    /// The new snapshot; of the same generation if nothing changed.
    pub fn finish(mut self) -> Snapshot {
        self.snapshot.generation += u64::from(self.changed);
        self.snapshot
    }
}

impl View for Snapshot {
    fn generation(&self) -> u64 {
        self.generation
    }

    fn get(&self, type_url: &str, name: &str) -> Option<Arc<Resource>> {
        self.types.get(type_url)?.resources.get(name).cloned()
    }

    fn by_alias(&self, type_url: &str, alias: &str) -> Option<Arc<Resource>> {
        self.find_alias(type_url, alias, |_| true)
    }

    fn for_each(&self, type_url: &str, f: &mut dyn FnMut(&Arc<Resource>)) {
        let Some(table) = self.types.get(type_url) else { return };
        table.resources.0.iter().flat_map(|shard| shard.values()).for_each(f);
    }

    fn changed_since(&self, older: &Self, type_url: &str, f: &mut dyn FnMut(&Arc<str>)) {
        let (new, old) = match (self.types.get(type_url), older.types.get(type_url)) {
            (Some(new), Some(old)) => (new, old),
            (Some(only), None) | (None, Some(only)) => {
                return only.resources.0.iter().flat_map(|s| s.keys()).for_each(f);
            }
            (None, None) => return,
        };
        for (new, old) in new.resources.0.iter().zip(&old.resources.0) {
            if Arc::ptr_eq(new, old) {
                continue;
            }
            for (name, resource) in new.iter() {
                if old.get(name).is_none_or(|o| !Arc::ptr_eq(o, resource) && o != resource) {
                    f(name);
                }
            }
            old.keys().filter(|name| !new.contains_key(*name)).for_each(&mut *f);
        }
    }
}

/// A snapshot without what one client must not see.
#[derive(Clone, Debug)]
pub struct FilteredView {
    snapshot: Arc<Snapshot>,
    audience: Audience,
}

impl FilteredView {
    /// What a client of this audience sees: everything, for [`Audience::Nodemesh`].
    pub fn new(snapshot: Arc<Snapshot>, audience: Audience) -> Self {
        Self { snapshot, audience }
    }

    fn keeps(&self, r: &Resource) -> bool {
        r.audience == Audience::Everyone || self.audience == Audience::Nodemesh
    }
}

impl View for FilteredView {
    fn generation(&self) -> u64 {
        self.snapshot.generation
    }

    fn get(&self, type_url: &str, name: &str) -> Option<Arc<Resource>> {
        self.snapshot.get(type_url, name).filter(|r| self.keeps(r))
    }

    fn by_alias(&self, type_url: &str, alias: &str) -> Option<Arc<Resource>> {
        self.snapshot.find_alias(type_url, alias, |r| self.keeps(r))
    }

    fn for_each(&self, type_url: &str, f: &mut dyn FnMut(&Arc<Resource>)) {
        self.snapshot.for_each(type_url, &mut |r| {
            if self.keeps(r) {
                f(r);
            }
        });
    }

    fn changed_since(&self, older: &Self, type_url: &str, f: &mut dyn FnMut(&Arc<str>)) {
        // Names that neither view shows are sorted out by whoever looks them up in both.
        self.snapshot.changed_since(&older.snapshot, type_url, f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(name: &str, content: &str, aliases: &[&str]) -> Arc<Resource> {
        let body = Any { type_url: "t".into(), value: content.as_bytes().to_vec().into() };
        Arc::new(Resource::new(name, aliases.iter().map(ToString::to_string).collect(), body))
    }

    fn changes(new: &Snapshot, old: &Snapshot) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        new.changed_since(old, "t", &mut |n| assert!(names.insert(n.to_string()), "{n} told twice"));
        names
    }

    #[test]
    fn versions_follow_content_and_nothing_else() {
        assert_eq!(resource("a", "x", &[]).version, resource("b", "x", &["al"]).version);
        assert_ne!(resource("a", "x", &[]).version, resource("a", "y", &[]).version);
    }

    #[test]
    fn diffs_name_exactly_what_changed() {
        let mut edit = Snapshot::default().edit();
        for i in 0..2_000 {
            assert!(edit.put("t", resource(&format!("r{i}"), "1", &[])));
        }
        let one = edit.finish();
        let mut edit = one.edit();
        assert!(!edit.put("t", resource("r7", "1", &[])), "equal content is no change");
        assert!(!edit.remove("t", "none") && !edit.changed());
        edit.put("t", resource("r7", "2", &[]));
        edit.put("t", resource("new", "1", &[]));
        edit.remove("t", "r9");
        let two = edit.finish();
        assert_eq!((one.len("t"), two.len("t"), two.generation()), (2_000, 2_000, 2));
        let want = ["new", "r7", "r9"].map(String::from).into();
        assert_eq!(changes(&two, &one), want);
        assert_eq!(changes(&one, &two), want);
        assert_eq!(changes(&two, &two.edit().finish()), BTreeSet::new());
        assert_eq!(changes(&one, &Snapshot::default()).len(), 2_000);
    }

    #[test]
    fn aliases_follow_their_resources() {
        let mut edit = Snapshot::default().edit();
        edit.put("t", resource("b", "1", &["n/1", "n/2"]));
        edit.put("t", resource("a", "1", &["n/1"]));
        let s = edit.finish();
        let found = |s: &Snapshot, alias: &str| s.by_alias("t", alias).map(|r| r.name.to_string());
        assert_eq!(found(&s, "n/1").as_deref(), Some("a"));
        assert_eq!(found(&s, "n/2").as_deref(), Some("b"));
        let mut edit = s.edit();
        edit.put("t", resource("b", "2", &["n/3"]));
        edit.remove("t", "a");
        let s = edit.finish();
        assert_eq!((found(&s, "n/1"), found(&s, "n/2")), (None, None));
        assert_eq!(found(&s, "n/3").as_deref(), Some("b"));
    }

    #[test]
    fn a_filtered_view_hides_what_is_for_others() {
        let mut edit = Snapshot::default().edit();
        let ours = Resource::clone(&resource("a", "1", &["n/1"])).for_audience(Audience::Nodemesh);
        edit.put("t", Arc::new(ours));
        edit.put("t", resource("b", "1", &["n/1"]));
        let s = Arc::new(edit.finish());
        let (all, some) =
            (FilteredView::new(s.clone(), Audience::Nodemesh), FilteredView::new(s, Audience::Everyone));
        assert!(all.get("t", "a").is_some() && some.get("t", "a").is_none());
        assert_eq!(some.by_alias("t", "n/1").map(|r| r.name.to_string()).as_deref(), Some("b"));
        let count = |v: &FilteredView| {
            let mut n = 0;
            v.for_each("t", &mut |_| n += 1);
            n
        };
        assert_eq!((count(&all), count(&some)), (2, 1));
    }
}
