//! The configuration on disk, whole, changed, and damaged in every way.

use super::{cache::Latest, *};
use mesh_xds::{
    delta::{Changes, Received},
    grpc::AdsStatus,
    wire::Any,
};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::sync::watch;

const A: &str = "type/a";
const B: &str = "type/b";

fn owner() -> Owner {
    Owner { node: "n1".into(), cluster: "c1".into(), trust_domain: "cluster.local".into() }
}

fn cache(dir: &Path) -> ConfigCache {
    ConfigCache::new(&dir.join("state"), owner()).unwrap()
}

fn received(type_url: &str, name: &str, content: &str) -> Received {
    let body = Any { type_url: type_url.into(), value: content.as_bytes().to_vec().into() };
    Received { name: name.into(), version: format!("v-{content}"), aliases: vec![format!("n/{name}")], body }
}

fn put(latest: &mut Latest, type_url: &str, name: &str, content: &str) {
    latest.insert((type_url.into(), name.into()), Some(received(type_url, name, content)));
}

fn gone(latest: &mut Latest, type_url: &str, name: &str) {
    latest.insert((type_url.into(), name.into()), None);
}

/// What is on disk: content by type and name.
fn content(cache: &ConfigCache) -> BTreeMap<(String, String), String> {
    let loaded = cache.load().unwrap().expect("there is a file");
    let mut all = BTreeMap::new();
    for changes in loaded.changes {
        assert!(changes.removed.is_empty());
        for r in changes.resources {
            let text = String::from_utf8(r.body.value.to_vec()).unwrap();
            assert_eq!(r, received(&changes.type_url, &r.name, &text), "not as it came");
            assert!(all.insert((changes.type_url.clone(), r.name), text).is_none());
        }
    }
    all
}

fn expected(entries: &[(&str, &str, &str)]) -> BTreeMap<(String, String), String> {
    entries.iter().map(|(t, n, c)| (((*t).into(), (*n).into()), (*c).into())).collect()
}

#[test]
fn what_was_written_is_loaded_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    assert!(cache(dir.path()).load().unwrap().is_none());
    let mut first = cache(dir.path());
    let mut latest = Latest::new();
    put(&mut latest, A, "x", "1");
    put(&mut latest, A, "y", "1");
    put(&mut latest, B, "x", "other");
    first.write(&latest).unwrap();
    let mut latest = Latest::new();
    put(&mut latest, A, "x", "2");
    gone(&mut latest, A, "y");
    gone(&mut latest, B, "never there");
    put(&mut latest, B, "z", "1");
    first.write(&latest).unwrap();
    let want = expected(&[(A, "x", "2"), (B, "x", "other"), (B, "z", "1")]);
    assert_eq!(content(&first), want);
    drop(first);

    // The next one begins with a rewrite, which keeps what did not change.
    let mut second = cache(dir.path());
    assert_eq!(content(&second), want);
    let mut latest = Latest::new();
    gone(&mut latest, A, "x");
    put(&mut latest, B, "x", "new");
    second.write(&latest).unwrap();
    assert_eq!(content(&second), expected(&[(B, "x", "new"), (B, "z", "1")]));

    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir.path().join("state")), mode(second.path())), (0o700, 0o600));
}

#[test]
fn the_file_stays_in_proportion_to_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let mut cache = cache(dir.path());
    let text = "x".repeat(20_000);
    let mut latest = Latest::new();
    for i in 0..100 {
        put(&mut latest, A, &format!("r{i}"), &text);
    }
    let whole = cache.write(&latest).unwrap();
    let (mut most, mut appended) = (0, 0);
    for round in 0..300 {
        let mut latest = Latest::new();
        put(&mut latest, A, &format!("r{}", round % 100), &format!("{round}{text}"));
        let bytes = cache.write(&latest).unwrap();
        appended += bytes;
        most = most.max(fs::metadata(cache.path()).unwrap().len());
    }
    assert!(most <= whole * 21 / 10, "{most} bytes for {whole}");
    assert!(appended < whole + 3 * 300 * 41_000, "{appended} bytes were written for 300 changes");
    assert_eq!(content(&cache).len(), 100);
    assert!(content(&cache).values().all(|c| c.starts_with('2')), "the last 100 rounds");
}

/// Two snapshots' worth of file: where the appended part begins, and its bytes.
fn file_with_appended_part(dir: &Path) -> (u64, Vec<u8>) {
    let mut cache = cache(dir);
    let mut latest = Latest::new();
    put(&mut latest, A, "x", "1");
    put(&mut latest, B, "y", "1");
    let snapshot = cache.write(&latest).unwrap();
    for content in ["2", "3"] {
        let mut latest = Latest::new();
        put(&mut latest, A, "x", content);
        cache.write(&latest).unwrap();
    }
    (snapshot, fs::read(cache.path()).unwrap())
}

#[test]
fn a_change_that_a_crash_cut_off_is_left_out_and_the_rest_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (snapshot, good) = file_with_appended_part(dir.path());
    let frame = (good.len() as u64 - snapshot) / 2;
    let path = dir.path().join("state/config");
    for len in snapshot..good.len() as u64 {
        fs::write(&path, &good[..usize::try_from(len).unwrap()]).unwrap();
        let whole = (len - snapshot) / frame;
        let cache = cache(dir.path());
        let want = (whole + 1).to_string();
        assert_eq!(content(&cache), expected(&[(A, "x", &want), (B, "y", "1")]), "{len} bytes");
        assert_eq!(cache.load().unwrap().unwrap().torn, (len - snapshot) % frame);
    }
    // What a file system leaves of data that did not reach the disk.
    let mut zeros = good.clone();
    zeros.resize(good.len() + 4096, 0);
    fs::write(&path, &zeros).unwrap();
    let mut again = cache(dir.path());
    assert_eq!(again.load().unwrap().unwrap().torn, 4096);
    // And the next write leaves a good file.
    let mut latest = Latest::new();
    put(&mut latest, B, "y", "4");
    again.write(&latest).unwrap();
    assert_eq!(content(&again), expected(&[(A, "x", "3"), (B, "y", "4")]));
}

#[test]
fn a_damaged_file_is_refused_with_a_reason_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (snapshot, good) = file_with_appended_part(dir.path());
    let path = dir.path().join("state/config");
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x20;
        bytes
    };
    let with_format = |format: u8| {
        let mut bytes = good.clone();
        bytes[8] = format;
        bytes
    };
    let end = usize::try_from(snapshot).unwrap();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "not a configuration of nodemesh"),
        ("text", b"apiVersion: v1\nkind: ConfigMap\n# and so on\n".to_vec(), "not a configuration"),
        ("a header alone", good[..24].to_vec(), "cut off"),
        ("half a header", good[..12].to_vec(), "cut off"),
        ("half a snapshot", good[..end - 5].to_vec(), "cut off"),
        ("a newer format", with_format(9), "has format 9, and this version reads format 1"),
        ("a wrong end", flipped(13), "checksum"),
        ("a wrong owner", flipped(40), "checksum"),
        ("a wrong byte", flipped(end - 3), "checksum"),
    ];
    for (name, bytes, words) in cases {
        fs::write(&path, bytes).unwrap();
        let mut cache = cache(dir.path());
        let error = cache.load().unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("state/config"), "{name}: {error}");
        // The control plane has sent everything anew.
        let mut latest = Latest::new();
        put(&mut latest, B, "fresh", "1");
        cache.write(&latest).unwrap();
        assert_eq!(content(&cache), expected(&[(B, "fresh", "1")]), "{name}");
    }
    for (name, other) in [
        ("node", Owner { node: "n2".into(), ..owner() }),
        ("cluster", Owner { cluster: "c2".into(), ..owner() }),
        ("trust domain", Owner { trust_domain: "td".into(), ..owner() }),
    ] {
        let other = ConfigCache::new(&dir.path().join("state"), other).unwrap();
        let error = other.load().unwrap_err().to_string();
        assert!(error.contains("n1") && error.contains("--state-dir"), "{name}: {error}");
    }
}

#[test]
fn a_file_that_others_can_write_or_that_is_a_link_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    file_with_appended_part(dir.path());
    let path = dir.path().join("state/config");
    fs::set_permissions(&path, Permissions::from_mode(0o620)).unwrap();
    let error = cache(dir.path()).load().unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("0600"), "{error}");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
    assert!(cache(dir.path()).load().is_err());
    assert!(private_dir(&path).is_err(), "a link for a directory");
}

#[test]
fn two_daemons_do_not_write_to_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new) = (cache(dir.path()), cache(dir.path()));
    let mut latest = Latest::new();
    put(&mut latest, A, "x", "old");
    old.write(&latest).unwrap();
    put(&mut latest, A, "x", "new");
    let error = new.write(&latest).unwrap_err();
    assert!(error.retryable() && error.to_string().contains("another daemon"), "{error}");
    put(&mut latest, A, "y", "old");
    old.write(&latest).unwrap();
    drop(old);
    latest.remove(&(A.into(), "y".into()));
    new.write(&latest).unwrap();
    assert_eq!(content(&new), expected(&[(A, "x", "new"), (A, "y", "old")]));
}

#[test]
fn nothing_is_written_before_everything_is_known_and_everything_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (ads, status) = watch::channel(AdsStatus::default());
    let writer = CacheWriter::new();
    let thread = writer.start(cache(dir.path()), status).unwrap();
    let changes =
        |name: &str| Changes { resources: vec![received(A, name, "1")], ..Changes::of_type(A.into()) };
    writer.record(changes("x"));
    let gathered = Instant::now();
    while gathered.elapsed() < Duration::from_millis(1_500) {
        assert!(cache(dir.path()).load().unwrap().is_none(), "half a configuration is on disk");
        std::thread::sleep(Duration::from_millis(50));
    }
    ads.send_modify(|s| s.synced = true);
    let deadline = Instant::now() + Duration::from_secs(20);
    while writer.stats().written == 0 {
        assert!(Instant::now() < deadline, "it is never written");
        std::thread::sleep(Duration::from_millis(10));
    }
    writer.record(changes("y"));
    writer.record(Changes { removed: vec!["x".into()], ..Changes::of_type(A.into()) });
    writer.stop();
    thread.join().unwrap();
    assert_eq!(content(&cache(dir.path())), expected(&[(A, "y", "1")]));
    let stats = writer.stats();
    assert!(
        stats.failed == 0 && stats.file_bytes > 0 && stats.written_bytes >= stats.file_bytes,
        "{stats:?}"
    );
}

#[test]
fn a_replaced_file_is_the_old_one_until_it_is_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    let write = |text: &'static str| move |file: &mut File| io::Write::write_all(file, text.as_bytes());
    replace(&path, write("one")).unwrap();
    let fails = replace(&path, |file| {
        io::Write::write_all(file, b"tw")?;
        Err::<(), _>(io::Error::other("the disk is full"))
    });
    assert!(fails.is_err());
    assert_eq!(read_private(&path, 10).unwrap().unwrap(), b"one");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the rest of the attempt is still there");
    replace(&path, write("two")).unwrap();
    assert_eq!(read_private(&path, 3).unwrap().unwrap(), b"two");
    assert!(read_private(&path, 2).is_err(), "larger than the limit");
    assert!(read_private(&dir.path().join("none"), 2).unwrap().is_none());
}
