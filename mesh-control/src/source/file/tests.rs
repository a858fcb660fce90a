//! Hot reload: what stays in force, what goes, and where problems are said to be.

use super::*;
use crate::{
    engine::{Engine, Report},
    index::Settings,
    object::ObjectKey,
    report::Problem,
    source::Event,
};
use std::{fs, path::Path};

fn files(list: &[(&str, &str)]) -> Files {
    list.iter().map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned()))).collect()
}

fn account(name: &str) -> String {
    format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: shop}}\n")
}

fn service(name: &str, port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\nspec:\n  clusterIP: None\n  ports:\n  - port: {port}\n"
    )
}

/// The changes, as short texts.
fn changes(events: &[Event]) -> Vec<String> {
    events
        .iter()
        .map(|event| match event {
            Event::Put(object) => format!("+{}", object.key().name.name),
            Event::Delete(key) => format!("-{}", key.name.name),
        })
        .collect()
}

fn in_force(tracker: &Tracker) -> Vec<String> {
    tracker.objects().map(|(key, _)| key.name.name.clone()).collect()
}

fn lines(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

#[test]
fn changes_are_told_once() {
    let mut tracker = Tracker::default();
    let two = format!("{}---\n{}", account("a"), account("b"));
    assert_eq!(changes(&tracker.update(files(&[("x.yaml", &two)]))), ["+a", "+b"]);
    assert_eq!(changes(&tracker.update(files(&[("x.yaml", &two)]))), Vec::<String>::new());
    // Moving an object to another file changes nothing.
    let moved = files(&[("x.yaml", &account("a")), ("y.yaml", &account("b"))]);
    assert_eq!(changes(&tracker.update(moved)), Vec::<String>::new());
    assert_eq!(changes(&tracker.update(files(&[("y.yaml", &account("b"))]))), ["-a"]);
}

#[test]
fn a_broken_object_keeps_its_last_good_form_and_disturbs_no_other() {
    let mut tracker = Tracker::default();
    tracker.update(files(&[("x.yaml", &format!("{}---\n{}", service("s", "80"), account("a")))]));
    let broken = format!("{}---\n{}---\n{}", service("s", "0"), account("a"), account("b"));
    assert_eq!(changes(&tracker.update(files(&[("x.yaml", &broken)]))), ["+b"]);
    assert_eq!(in_force(&tracker), ["a", "b", "s"]);
    let problems = lines(tracker.problems());
    assert_eq!(
        problems,
        [
            "x.yaml:9: error: Service shop/s: spec.ports[0].port: 0 is not a port; use a number from 1 to 65535"
        ]
    );
    // Corrected.
    let events = tracker.update(files(&[("x.yaml", &service("s", "81"))]));
    assert_eq!(changes(&events), ["-a", "-b", "+s"]);
    assert_eq!(tracker.problems(), []);
    // Broken and then removed: gone.
    tracker.update(files(&[("x.yaml", &service("s", "0"))]));
    assert_eq!(in_force(&tracker), ["s"]);
    assert_eq!(changes(&tracker.update(files(&[("x.yaml", "")]))), ["-s"]);
}

#[test]
fn broken_syntax_keeps_what_its_file_had() {
    let mut tracker = Tracker::default();
    let good = format!("{}---\n{}", account("a"), account("b"));
    tracker.update(files(&[("x.yaml", &good), ("y.yaml", &account("c"))]));
    // The document of `a` cannot be read any more; `b` is changed to `d`, which may mean that `b` is gone, or that it
    // is what the unreadable document says now.
    let bad = format!("kind: [\n---\n{}", account("d"));
    let events = tracker.update(files(&[("x.yaml", &bad), ("y.yaml", &account("c"))]));
    assert_eq!(changes(&events), ["+d"]);
    assert_eq!(in_force(&tracker), ["a", "b", "c", "d"]);
    let problem = &lines(tracker.problems())[0];
    assert!(problem.starts_with("x.yaml:") && problem.contains("not valid YAML"), "{problem}");
    // Another file is not affected.
    let events = tracker.update(files(&[("x.yaml", &bad)]));
    assert_eq!(changes(&events), ["-c"]);
    let events = tracker.update(files(&[("x.yaml", &account("d"))]));
    assert_eq!(changes(&events), ["-a", "-b"]);
}

/// Everything that a text can be instead of Kubernetes objects. Each stands in a file with a good object before and after
/// it, and is reported with its line and what to do, and nothing else happens.
#[test]
fn every_kind_of_broken_text_is_reported_and_disturbs_nothing() {
    let deep = "[".repeat(5_000);
    let bomb: String = (0..20).fold("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned(), |text, i| {
        let refs = vec![format!("*a{i}"); 10].join(", ");
        text + &format!("a{}: &a{} [{refs}]\n", i + 1, i + 1)
    });
    let unknown = |api: &str, kind: &str| format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x}}");
    let cases: [(&str, &str, &[&str]); 17] = [
        ("an open bracket", "kind: [", &["not valid YAML"]),
        ("an open quote", "kind: \"Pod", &["not valid YAML"]),
        ("a tab", "kind: Pod\n\tmetadata: {}", &["not valid YAML"]),
        ("no space after a colon", "metadata:\n  name: a\n name: b", &["not valid YAML"]),
        ("a key that comes twice", "kind: Pod\nkind: Service", &["not valid YAML", "kind"]),
        ("an alias to nothing", "kind: *nowhere", &["not valid YAML", "unknown anchor"]),
        ("too deep", &deep, &["not valid YAML", "recursion limit"]),
        ("an alias bomb", &bomb, &["not valid YAML", "repetition limit"]),
        ("control characters", "kind: \u{1}\u{2}", &["not valid YAML", "control characters"]),
        ("a word", "hello", &["kind: there is no kind; add apiVersion and kind"]),
        ("a list", "- kind: Pod\n- kind: Service", &["kind: there is no kind; add apiVersion and kind"]),
        ("a number", "42", &["kind: there is no kind; add apiVersion and kind"]),
        ("a kind that is no text", "apiVersion: v1\nkind: 7\nmetadata: {name: x}", &["kind"]),
        ("a List of nothing", "apiVersion: v1\nkind: List\nitems: 7", &["items"]),
        ("an unknown kind", &unknown("v1", "ConfigMap"), &["warning", "ConfigMap"]),
        ("an unknown group", &unknown("example.com/v1", "Service"), &["warning", "example.com"]),
        ("an unknown version", &unknown("v9", "Service"), &["warning", "apiVersion", "use apiVersion v1"]),
    ];
    let mut wrong = vec![];
    for (name, text, words) in cases {
        let mut tracker = Tracker::default();
        let file = format!("{}---\n{text}\n---\n{}", account("a"), account("b"));
        let told = changes(&tracker.update(files(&[("x.yaml", &file)])));
        let problems = lines(tracker.problems());
        let line = problems.first().and_then(|p| p.strip_prefix("x.yaml:")?.split(':').next()?.parse().ok());
        // The parser notices an open end on the line after it.
        let lines = 5..=5 + text.lines().count();
        let named = words.iter().all(|word| problems.len() == 1 && problems[0].contains(word));
        if told != ["+a", "+b"] || !line.is_some_and(|line| lines.contains(&line)) || !named {
            wrong.push((name, words, told, problems));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn files_that_are_no_text_or_too_large_are_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), account("a")).unwrap();
    fs::write(dir.path().join("binary.yaml"), b"kind: \xff\xfe").unwrap();
    fs::File::create(dir.path().join("large.yaml")).unwrap().set_len(17 << 20).unwrap();
    fs::write(dir.path().join("empty.yaml"), "").unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("dangling.yaml")).unwrap();
    fs::create_dir(dir.path().join("folder.yaml")).unwrap();
    let mut engine = Engine::new(dir.path().to_owned(), Settings::default());
    let report = engine.step().report.clone();
    let problems = lines(&report.problems);
    for (file, words) in [("binary.yaml", "UTF-8"), ("large.yaml", "larger than 16 MiB")] {
        let hit = problems.iter().any(|p| p.starts_with(file) && p.contains(words));
        assert!(hit, "{file}: {problems:#?}");
    }
    assert_eq!(problems.len(), 2, "{problems:#?}");
}

#[test]
fn a_file_that_cannot_be_read_keeps_its_objects() {
    let mut tracker = Tracker::default();
    tracker.update(files(&[("x.yaml", &account("a"))]));
    let unreadable = Files::from([("x.yaml".to_owned(), Err("it cannot be read: no".to_owned()))]);
    assert_eq!(changes(&tracker.update(unreadable)), Vec::<String>::new());
    assert_eq!(in_force(&tracker), ["a"]);
    assert_eq!(tracker.problems().len(), 1);
}

#[test]
fn the_first_of_two_definitions_counts() {
    let mut tracker = Tracker::default();
    let events = tracker.update(files(&[("b.yaml", &service("s", "1")), ("a.yaml", &service("s", "2"))]));
    let Event::Put(crate::object::Object::Service(service)) = &events[0] else { panic!() };
    assert_eq!((events.len(), service.ports[0].port), (1, 2));
    let problem = &lines(tracker.problems())[0];
    assert!(problem.starts_with("b.yaml:4: error: Service shop/s: metadata.name: "), "{problem}");
    assert!(problem.contains("defined in a.yaml:4 already; the first one counts"), "{problem}");
}

#[test]
fn lists_stand_for_their_items() {
    let mut tracker = Tracker::default();
    let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ServiceAccount, metadata: {name: a}}\n- apiVersion: v1\n  kind: Service\n  metadata: {name: s}\n  spec:\n    clusterIP: None\n    ports: [{port: 99999}]\n";
    assert_eq!(changes(&tracker.update(files(&[("x.json", list)]))), ["+a"]);
    let problem = &lines(tracker.problems())[0];
    assert!(problem.starts_with("x.json:10: error: Service default/s: spec.ports[0].port"), "{problem}");
    let json = r#"{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"j"}}"#;
    assert_eq!(changes(&tracker.update(files(&[("x.json", json)]))), ["-a", "+j"]);
}

#[test]
fn a_policy_that_was_never_good_refuses_until_it_is() {
    let policy = |field: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec:\n  action: DENY\n  {field}: []\n"
        )
    };
    let mut tracker = Tracker::default();
    assert_eq!(changes(&tracker.update(files(&[("x.yaml", &policy("ruls"))]))), ["+p"]);
    let key = ObjectKey::new(crate::object::Kind::AuthorizationPolicy, "default", "p");
    assert_eq!(tracker.objects().collect::<Vec<_>>(), [(&key, true)]);
    assert_eq!(changes(&tracker.update(files(&[("x.yaml", &policy("rules"))]))), ["+p"]);
    assert_eq!(tracker.objects().collect::<Vec<_>>(), [(&key, false)]);
    // Now there is a good version, and that one stays.
    assert_eq!(changes(&tracker.update(files(&[("x.yaml", &policy("ruls"))]))), Vec::<String>::new());
    assert_eq!(tracker.objects().collect::<Vec<_>>(), [(&key, false)]);
}

fn step(engine: &mut Engine) -> (Vec<String>, std::sync::Arc<Report>) {
    let step = engine.step();
    (step.snapshot.services().keys().map(ToString::to_string).collect(), step.report.clone())
}

#[test]
fn a_directory_like_a_config_map() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path();
    let version = |name: &str, port: &str| {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("s.yaml"), service("s", port)).unwrap();
    };
    let point = |name: &str| {
        std::os::unix::fs::symlink(name, dir.join("..tmp")).unwrap();
        fs::rename(dir.join("..tmp"), dir.join("..data")).unwrap();
    };
    version("..1", "80");
    point("..1");
    std::os::unix::fs::symlink("..data/s.yaml", dir.join("s.yaml")).unwrap();
    fs::write(dir.join("notes.txt"), "not: [yaml").unwrap();
    let mut engine = Engine::new(dir.to_owned(), Settings::default());
    let (services, report) = step(&mut engine);
    assert_eq!(services, ["shop/s.shop.svc.cluster.local"]);
    assert!(!report.failed(), "{report:?}");
    let first = engine.step().snapshot.clone();
    version("..2", "81");
    point("..2");
    let second = engine.step().snapshot.clone();
    assert_eq!(second.services()["shop/s.shop.svc.cluster.local"].ports[0].port, 81);
    assert!(!std::sync::Arc::ptr_eq(&first, &second));
    assert!(std::sync::Arc::ptr_eq(&second, &engine.step().snapshot), "nothing changed");
    // The directory goes away: all stays, and the report says so.
    fs::rename(dir, dir.with_extension("gone")).unwrap();
    let (services, report) = step(&mut engine);
    assert_eq!(services.len(), 1);
    assert!(report.failed() && report.directory.as_ref().unwrap().contains("cannot list"), "{report:?}");
    fs::rename(dir.with_extension("gone"), dir).unwrap();
    assert!(!step(&mut engine).1.failed());
}

#[tokio::test]
async fn a_watch_sees_files_come_and_change() {
    let dir = tempfile::tempdir().unwrap();
    let mut watch = Watch::new(dir.path()).unwrap();
    let mut engine = Engine::new(dir.path().to_owned(), Settings::default());
    for (port, wanted) in [("80", 80), ("81", 81)] {
        write_like_an_editor(dir.path(), &service("s", port));
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            let step = engine.step();
            let found = step.snapshot.services().values().next().map(|s| s.ports[0].port);
            if found == Some(wanted) {
                break;
            }
            tokio::time::timeout_at(deadline, watch.changed()).await.expect("the change was never seen");
        }
    }
}

fn write_like_an_editor(dir: &Path, text: &str) {
    fs::write(dir.join(".s.yaml.swp"), text).unwrap();
    fs::rename(dir.join(".s.yaml.swp"), dir.join("s.yaml")).unwrap();
}
