//! Chains that others verify, files that are damaged, and who gets which certificate.

use super::*;
use crate::{
    auth::Caller,
    decode::{self, Decoded},
    index::{Index, Settings},
    snapshot::Snapshot,
    source::Event,
};
use mesh_xds::model::SpiffeId;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::{RootCertStore, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use std::{fs, path::Path, sync::Arc, time::Duration};
use time::OffsetDateTime;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn csr_for(names: &[&str], key: &KeyPair) -> String {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.subject_alt_names =
        names.iter().map(|n| SanType::URI((*n).to_owned().try_into().unwrap())).collect();
    params.serialize_request(key).unwrap().pem().unwrap()
}

fn request(name: &str) -> SigningRequest {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    SigningRequest::from_pem(&csr_for(&[name], &key)).unwrap()
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn open(dir: &Path, now: OffsetDateTime) -> Result<Authority, CaError> {
    Authority::open(dir, "cluster.local", Lifetimes::default(), now)
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

/// Verifies a chain as a peer does that trusts the root alone.
fn verify(chain: &[String], root: &str, at: OffsetDateTime) -> Result<(), rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(der(root)).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(at.unix_timestamp().try_into().unwrap()));
    let between: Vec<_> = chain[1..chain.len() - 1].iter().map(|c| der(c)).collect();
    verifier.verify_client_cert(&der(&chain[0]), &between, now).map(|_| ())
}

#[test]
fn a_chain_leads_from_the_leaf_to_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let now = OffsetDateTime::now_utc();
    let authority = open(dir.path(), now).unwrap();
    let root = fs::read_to_string(dir.path().join("root-cert.pem")).unwrap();
    let issued = authority.sign(&request(WEB), &id(WEB), None, now).unwrap();
    assert_eq!(issued.chain.len(), 3);
    assert_eq!(der(&issued.chain[2]), der(&root));
    verify(&issued.chain, &root, now).unwrap();
    // A clock that is a minute behind accepts it; a day later it is over.
    verify(&issued.chain, &root, now - Duration::from_mins(1)).unwrap();
    assert!(verify(&issued.chain, &root, now + Duration::from_hours(25)).is_err());
    assert!(verify(&issued.chain, &root, now - Duration::from_mins(10)).is_err());

    let leaf = der(&issued.chain[0]);
    let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical, "the subject is empty, so the name has to be critical");
    assert_eq!(san.value.general_names, [x509_parser::extensions::GeneralName::URI(WEB)]);
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(!leaf.is_ca());
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth);
    let again = authority.sign(&request(WEB), &id(WEB), None, now).unwrap();
    assert_ne!(again.chain[0], issued.chain[0]);
}

#[test]
fn openssl_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let now = OffsetDateTime::now_utc();
    let authority = open(dir.path(), now).unwrap();
    let issued = authority.sign(&request(WEB), &id(WEB), None, now).unwrap();
    for (name, pem) in ["leaf.pem", "between.pem"].iter().zip(&issued.chain) {
        fs::write(dir.path().join(name), pem).unwrap();
    }
    let run = std::process::Command::new("openssl")
        .args(["verify", "-x509_strict", "-CAfile", "root-cert.pem", "-untrusted", "between.pem", "leaf.pem"])
        .current_dir(dir.path())
        .output();
    let Ok(run) = run else {
        // The chain is verified by webpki above; a machine without openssl loses the second opinion only.
        return;
    };
    let text = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{text}");
}

#[test]
fn validity_is_the_lesser_of_wish_and_limit() {
    let dir = tempfile::tempdir().unwrap();
    let now = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap();
    let authority = open(dir.path(), now).unwrap();
    let day = Duration::from_hours(24);
    for (wanted, given) in [
        (None, day),
        (Some(Duration::ZERO), day),
        (Some(Duration::from_hours(1)), Duration::from_hours(1)),
        (Some(Duration::from_hours(1000)), day),
    ] {
        let issued = authority.sign(&request(WEB), &id(WEB), wanted, now).unwrap();
        assert_eq!(issued.not_after, now + given, "{wanted:?}");
    }
    // Never longer than the certificate that signs.
    let late = authority.intermediate_not_after() - Duration::from_hours(2);
    let issued = authority.sign(&request(WEB), &id(WEB), None, late).unwrap();
    assert_eq!(issued.not_after, authority.intermediate_not_after());
}

#[test]
fn the_ca_is_kept_and_its_intermediate_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let now = OffsetDateTime::now_utc();
    let first = open(dir.path(), now).unwrap();
    let root = first.root_pem();
    let issued = first.sign(&request(WEB), &id(WEB), None, now).unwrap();
    assert!(matches!(open(dir.path(), now), Err(CaError::Locked { .. })));
    drop(first);
    let second = open(dir.path(), now).unwrap();
    assert_eq!(second.root_pem(), root);
    assert_eq!(second.sign(&request(WEB), &id(WEB), None, now).unwrap().chain[1], issued.chain[1]);
    // Two thirds of a year later it is due; the new one leads to the same root, and survives a restart.
    assert!(!second.renew_if_due(now + Duration::from_hours(24 * 240)).unwrap());
    let later = now + Duration::from_hours(24 * 250);
    assert!(second.renew_if_due(later).unwrap());
    let renewed = second.sign(&request(WEB), &id(WEB), None, later).unwrap();
    assert_ne!(renewed.chain[1], issued.chain[1]);
    verify(&renewed.chain, &root, later).unwrap();
    drop(second);
    let third = open(dir.path(), later).unwrap();
    assert_eq!(third.sign(&request(WEB), &id(WEB), None, later).unwrap().chain[1], renewed.chain[1]);
}

#[test]
fn damaged_files_are_refused_with_a_remedy() {
    use std::os::unix::fs::PermissionsExt;
    let now = OffsetDateTime::now_utc();
    let other = tempfile::tempdir().unwrap();
    drop(open(other.path(), now).unwrap());
    let foreign = |name: &str| fs::read_to_string(other.path().join("ca").join(name)).unwrap();
    let half = |text: &str, part: &str| {
        let at = text.find(&format!("-----BEGIN {part}")).unwrap();
        let end = text.find(&format!("-----END {part}-----")).unwrap() + part.len() + 15;
        text[at..end].to_owned()
    };
    type Damage<'a> = Box<dyn Fn(&Path) + 'a>;
    let write = |name: &'static str, text: String| -> Damage<'_> {
        Box::new(move |ca| fs::write(ca.join(name), &text).unwrap())
    };
    let keep = |name: &'static str, part: &'static str| -> Damage<'_> {
        Box::new(move |ca| {
            let text = fs::read_to_string(ca.join(name)).unwrap();
            fs::write(ca.join(name), half(&text, part)).unwrap();
        })
    };
    let mixed: Damage<'_> = Box::new(|ca| {
        let own = fs::read_to_string(ca.join("root.pem")).unwrap();
        let text = half(&own, "PRIVATE KEY") + "\n" + &half(&foreign("root.pem"), "CERTIFICATE");
        fs::write(ca.join("root.pem"), text).unwrap();
    });
    let cases: Vec<(Damage<'_>, &str)> = vec![
        (keep("root.pem", "PRIVATE KEY"), "root.pem has no usable certificate"),
        (keep("root.pem", "CERTIFICATE"), "root.pem has no usable private key"),
        (keep("intermediate.pem", "CERTIFICATE"), "intermediate.pem has no usable private key"),
        (write("intermediate.pem", String::new()), "intermediate.pem has no usable certificate"),
        (mixed, "does not belong to the certificate beside it"),
        (write("intermediate.pem", foreign("intermediate.pem")), "was not signed by the root beside it"),
        (Box::new(|ca| fs::remove_file(ca.join("root.pem")).unwrap()), "the file is missing"),
        (
            Box::new(|ca| {
                fs::set_permissions(ca.join("root.pem"), fs::Permissions::from_mode(0o640)).unwrap();
            }),
            "chmod 600",
        ),
    ];
    for (damage, words) in cases {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), now).unwrap());
        damage(&dir.path().join("ca"));
        let error = open(dir.path(), now).expect_err(words).to_string();
        assert!(error.contains(words), "wanted {words:?}, got {error:?}");
        assert!(["restore", "move", "chmod"].iter().any(|remedy| error.contains(remedy)), "{error}");
    }
    // A temporary file that a crash left behind is no damage, and keys are for their owner only.
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("ca")).unwrap();
    fs::write(dir.path().join("ca/root.pem.new"), "half").unwrap();
    drop(open(dir.path(), now).unwrap());
    for name in ["root.pem", "intermediate.pem"] {
        let mode = fs::metadata(dir.path().join("ca").join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let expired = open(dir.path(), now + Duration::from_hours(24 * 3700));
    assert!(matches!(expired, Err(CaError::RootExpired { .. })));
}

#[test]
fn requests_that_are_not_right() {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let good = csr_for(&[WEB], &key);
    assert_eq!(SigningRequest::from_pem(&good).unwrap().identity(), &id(WEB));
    let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    // Another name in the signed part, with the old signature.
    let forged = {
        use base64::Engine as _;
        let engine = base64::engine::general_purpose::STANDARD;
        let body: String = good.lines().filter(|l| !l.starts_with("---")).collect();
        let mut der = engine.decode(body).unwrap();
        let at = der.windows(3).position(|w| w == b"web").unwrap();
        der[at..at + 3].copy_from_slice(b"adm");
        format!(
            "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
            engine.encode(der)
        )
    };
    for (pem, words) in [
        (String::new(), "send the CSR as PEM"),
        ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n".into(), "PKCS #10"),
        ("x".repeat(20_000), "20000 bytes"),
        (forged, "signature"),
        (csr_for(&[WEB], &p384), "P-256"),
        (csr_for(&[], &key), "0 subject alternative names"),
        (csr_for(&[WEB, "spiffe://cluster.local/ns/shop/sa/other"], &key), "2 subject alternative names"),
        (csr_for(&["https://example.org"], &key), "not a workload identity"),
    ] {
        let error = SigningRequest::from_pem(&pem).expect_err(words).to_string();
        assert!(error.contains(words), "wanted {words:?}, got {error:?}");
    }
}

/// Two nodes with a pod each, a pod outside of the mesh, one of the host's network, and one that has finished.
fn snapshot() -> Arc<Snapshot> {
    let pod = |name: &str, node: &str, extra: &str, status: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{nodemesh.io/enabled: \"{}\"}}}}, \
             spec: {{nodeName: {node}, serviceAccountName: {name}, containers: [], {extra}}}, status: {{{status}}}}}",
            name != "outside"
        )
    };
    let mut index = Index::new(Settings::default());
    for text in [
        pod("web", "n1", "", "podIP: 10.0.0.1"),
        pod("pay", "n2", "", "podIP: 10.0.0.2"),
        pod("starting", "n1", "", ""),
        pod("outside", "n1", "", "podIP: 10.0.0.3"),
        pod("host", "n1", "hostNetwork: true", "podIP: 10.0.0.4"),
        pod("done", "n1", "", "phase: Succeeded"),
    ] {
        match decode::decode(&serde_yaml_ng::from_str(&text).unwrap()) {
            Decoded::Good { object, .. } => index.apply(Event::Put(*object)),
            other => panic!("{other:?}"),
        }
    }
    index.snapshot()
}

#[test]
fn who_may_have_which_certificate() {
    let snapshot = snapshot();
    let spiffe = |sa: &str| format!("spiffe://cluster.local/ns/shop/sa/{sa}");
    let node = |name: &str| Caller::Node { name: name.into() };
    let workload = |sa: &str| Caller::Workload { identity: id(&spiffe(sa)) };
    let (web, pay) = (spiffe("web"), spiffe("pay"));
    let foreign = "spiffe://other.td/ns/shop/sa/web".to_owned();
    // caller, impersonated, in the CSR, outcome
    for (caller, wanted, csr, outcome) in [
        (node("n1"), Some(&web), &web, Ok(())),
        (node("n2"), Some(&pay), &pay, Ok(())),
        (node("n1"), Some(&spiffe("starting")), &spiffe("starting"), Ok(())),
        (node("n1"), Some(&pay), &pay, Err("not_on_node")),
        (node("n2"), Some(&web), &web, Err("not_on_node")),
        (node("n3"), Some(&web), &web, Err("not_on_node")),
        (node("n1"), Some(&spiffe("outside")), &spiffe("outside"), Err("not_on_node")),
        (node("n1"), Some(&spiffe("host")), &spiffe("host"), Err("not_on_node")),
        (node("n1"), Some(&spiffe("done")), &spiffe("done"), Err("not_on_node")),
        (node("n1"), Some(&spiffe("nobody")), &spiffe("nobody"), Err("not_on_node")),
        (node("n1"), Some(&foreign), &foreign, Err("trust_domain")),
        (node("n1"), Some(&"web".to_owned()), &web, Err("not_an_identity")),
        (node("n1"), Some(&web), &pay, Err("csr_mismatch")),
        (node("n1"), None, &web, Err("no_impersonation")),
        (workload("web"), None, &web, Ok(())),
        (workload("web"), None, &pay, Err("csr_mismatch")),
        (workload("web"), Some(&web), &web, Err("impersonation_not_by_node")),
        (Caller::Workload { identity: id(&foreign) }, None, &foreign, Err("trust_domain")),
    ] {
        let decided = decide(&caller, wanted.map(String::as_str), &request(csr), "cluster.local", &snapshot);
        let case = format!("{caller:?} {wanted:?} {csr}");
        match (&decided, outcome) {
            (Ok(identity), Ok(())) => assert_eq!(identity.to_string(), *csr, "{case}"),
            (Err(denied), Err(reason)) => assert_eq!(denied.reason(), reason, "{case}: {denied}"),
            _ => panic!("{case}: {decided:?}"),
        }
    }
}
