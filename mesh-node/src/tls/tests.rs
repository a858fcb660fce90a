//! Real handshakes over an in-memory pipe, each refusal with its reason on the side that refuses.

use super::{testca::*, *};
use mesh_xds::model::SpiffeId;
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const LIMIT: Duration = Duration::from_secs(5);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn set(ids: &[&str]) -> BTreeSet<SpiffeId> {
    ids.iter().map(|id| id.parse().unwrap()).collect()
}

/// Accepts every server: the tests' own clients attack servers, they do not judge them.
#[derive(Debug)]
struct TrustAll;

impl ServerCertVerifier for TrustAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

fn hostile_client(cert: Option<Chain>, alpn: &[&[u8]]) -> ClientConfig {
    let builder =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustAll));
    let mut config = match cert {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config
}

/// What our server says about such a client.
async fn server_refuses(config: ClientConfig) -> TlsReject {
    let ca = CA.with(Clone::clone);
    let server = ca.identity(CART);
    let (near, far) = duplex(64 << 10);
    let client = async move {
        let name = ServerName::IpAddress(LOOPBACK.into());
        if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, near).await {
            // In TLS 1.3 the client learns of a refusal only when it reads.
            let _ = stream.read(&mut [0]).await;
        }
    };
    let (result, ()) = tokio::join!(accept(far, &server, LIMIT), client);
    result.expect_err("the server accepted the client")
}

thread_local! {
    /// One CA for all tests of a thread that need a trusted one.
    static CA: Arc<TestCa> = Arc::new(TestCa::new());
}

fn ca() -> Arc<TestCa> {
    CA.with(Clone::clone)
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let (cart, web) = (ca().identity(CART), ca().identity(WEB));
    let (near, far) = duplex(64 << 10);
    let expected = set(&[CART, "spiffe://cluster.local/ns/shop/sa/other"]);
    let (server, client) =
        tokio::join!(accept(far, &cart, LIMIT), connect(near, &web, &expected, LOOPBACK, LIMIT));
    let ((mut server, seen_by_server), (mut client, seen_by_client)) = (server.unwrap(), client.unwrap());
    assert_eq!(seen_by_server.id.to_string(), WEB);
    assert_eq!(seen_by_client.id.to_string(), CART);
    assert_eq!(seen_by_client.not_after, cart.cell().current().unwrap().not_after());
    let state = server.get_ref().1;
    assert_eq!(state.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(state.alpn_protocol(), Some(ALPN_H2));
    assert!(state.server_name().is_none(), "SNI was sent");
    let group = state.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    client.write_all(b"hello").await.unwrap();
    let mut buffer = [0; 5];
    server.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"hello");
}

#[tokio::test]
async fn a_peer_without_the_hybrid_key_exchange_is_served() {
    let mut config = hostile_client(Some(ca().issue(&Leaf::of(WEB))), &[ALPN_H2]);
    let plain = rustls::crypto::CryptoProvider {
        kx_groups: vec![rustls::crypto::aws_lc_rs::kx_group::SECP256R1],
        ..rustls::crypto::aws_lc_rs::default_provider()
    };
    config = ClientConfig::builder_with_provider(Arc::new(plain))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAll))
        .with_client_cert_resolver(config.client_auth_cert_resolver);
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    let cart = ca().identity(CART);
    let (near, far) = duplex(64 << 10);
    let name = ServerName::IpAddress(LOOPBACK.into());
    let connector = TlsConnector::from(Arc::new(config));
    let (server, client) = tokio::join!(accept(far, &cart, LIMIT), connector.connect(name, near));
    client.unwrap();
    assert_eq!(server.unwrap().1.id.to_string(), WEB);
}

#[tokio::test]
async fn the_server_refuses_with_a_reason() {
    let foreign = "spiffe://elsewhere.test/ns/shop/sa/web";
    let two = || {
        let mut leaf = Leaf::of(WEB);
        leaf.uris.push(CART.to_owned());
        leaf
    };
    let server_only = || {
        let mut leaf = Leaf::of(WEB);
        leaf.usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        leaf
    };
    let early = || {
        let mut leaf = Leaf::of(WEB);
        leaf.from = SystemTime::now() + Duration::from_secs(600);
        leaf
    };
    let good = ca();
    let other = TestCa::new();
    let h2: &[&[u8]] = &[ALPN_H2];
    type Case<'a> = (&'a str, Option<Chain>, &'a [&'a [u8]], RejectReason, Option<&'a str>);
    let cases: Vec<Case<'_>> = vec![
        ("no certificate", None, h2, RejectReason::NoCertificate, None),
        ("expired", Some(good.issue(&Leaf::of(WEB).expired())), h2, RejectReason::Expired, Some(WEB)),
        ("not yet valid", Some(good.issue(&early())), h2, RejectReason::NotYetValid, Some(WEB)),
        ("other CA", Some(other.issue(&Leaf::of(WEB))), h2, RejectReason::UnknownCa, Some(WEB)),
        (
            "other domain",
            Some(good.issue(&Leaf::of(foreign))),
            h2,
            RejectReason::WrongTrustDomain,
            Some(foreign),
        ),
        ("two identities", Some(good.issue(&two())), h2, RejectReason::NoIdentity, None),
        (
            "not a workload",
            Some(good.issue(&Leaf::of("spiffe://cluster.local/node"))),
            h2,
            RejectReason::NoIdentity,
            Some("spiffe://cluster.local/node"),
        ),
        ("server only", Some(good.issue(&server_only())), h2, RejectReason::BadCertificate, Some(WEB)),
        ("http/1.1", Some(good.issue(&Leaf::of(WEB))), &[b"http/1.1"], RejectReason::BadAlpn, None),
        ("no ALPN", Some(good.issue(&Leaf::of(WEB))), &[], RejectReason::BadAlpn, Some(WEB)),
    ];
    for (name, cert, alpn, reason, presented) in cases {
        let reject = server_refuses(hostile_client(cert, alpn)).await;
        assert_eq!(reject.reason, reason, "{name}: {reject}");
        assert_eq!(reject.presented.as_deref(), presented, "{name}: {reject}");
    }
}

#[tokio::test]
async fn the_server_refuses_old_tls() {
    let (chain, key) = ca().issue(&Leaf::of(WEB));
    let mut config =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustAll))
            .with_client_auth_cert(chain, key)
            .unwrap();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    assert_eq!(server_refuses(config).await.reason, RejectReason::Incompatible);
}

#[tokio::test]
async fn plaintext_is_told_apart() {
    for bytes in [
        &b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00\x00\x00\x00\x00\x00\x00\x00",
        b"SSH-2.0-OpenSSH_9.7\r\n",
    ] {
        let cart = ca().identity(CART);
        let (mut near, far) = duplex(1024);
        near.write_all(bytes).await.unwrap();
        let reject = accept(far, &cart, LIMIT).await.unwrap_err();
        assert_eq!(reject.reason, RejectReason::NotTls, "{bytes:?}: {reject}");
    }
}

#[tokio::test]
async fn silence_and_departure() {
    let cart = ca().identity(CART);
    let (near, far) = duplex(1024);
    let reject = accept(far, &cart, Duration::from_millis(20)).await.unwrap_err();
    assert_eq!(reject.reason, RejectReason::HandshakeTimeout);
    drop(near);
    let (near, far) = duplex(1024);
    drop(near);
    let reject = accept(far, &cart, LIMIT).await.unwrap_err();
    assert_eq!(reject.reason, RejectReason::Disconnected);
}

/// What our client says about a server with this certificate.
async fn client_refuses(server: Chain, expected: &[&str]) -> TlsReject {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(server.0, server.1)
        .unwrap();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    let web = ca().identity(WEB);
    let expected = set(expected);
    let (near, far) = duplex(64 << 10);
    let (client, server) = tokio::join!(
        connect(near, &web, &expected, LOOPBACK, LIMIT),
        TlsAcceptor::from(Arc::new(config)).accept(far)
    );
    assert!(server.is_err(), "the server was not told that it was refused");
    client.expect_err("the client accepted the server")
}

#[tokio::test]
async fn the_client_refuses_with_a_reason() {
    let good = ca();
    let other = TestCa::new();
    for (name, server, reason) in [
        ("wrong identity", good.issue(&Leaf::of(WEB)), RejectReason::WrongIdentity),
        ("expired", good.issue(&Leaf::of(CART).expired()), RejectReason::Expired),
        ("other CA", other.issue(&Leaf::of(CART)), RejectReason::UnknownCa),
        (
            "other domain",
            good.issue(&Leaf::of("spiffe://elsewhere.test/ns/shop/sa/cart")),
            RejectReason::WrongIdentity,
        ),
    ] {
        let reject = client_refuses(server, &[CART]).await;
        assert_eq!(reject.reason, reason, "{name}: {reject}");
        assert!(reject.presented.is_some(), "{name}: {reject}");
    }
    let reject = client_refuses(good.issue(&Leaf::of(CART)), &[]).await;
    assert_eq!(reject.reason, RejectReason::WrongIdentity, "an empty set accepted somebody");
}

type Ahead = ReadAhead<DuplexStream>;

async fn shake(
    client: &Arc<LocalIdentity>,
    server: &Arc<LocalIdentity>,
) -> (tokio_rustls::client::TlsStream<Ahead>, tokio_rustls::server::TlsStream<Ahead>) {
    let (near, far) = duplex(64 << 10);
    let expected = BTreeSet::from([server.id().clone()]);
    let (c, s) = tokio::join!(connect(near, client, &expected, LOOPBACK, LIMIT), accept(far, server, LIMIT));
    (c.unwrap().0, s.unwrap().0)
}

#[tokio::test]
async fn rotation_reaches_new_handshakes_and_leaves_old_connections_alone() {
    let (cart, web) = (ca().identity(CART), ca().identity(WEB));
    let (config, before) = (cart.server_config(), cart.cell().current().unwrap());
    let (mut client, mut server) = shake(&web, &cart).await;
    cart.cell().install(ca().cert(cart.id()));
    web.cell().install(ca().cert(web.id()));
    assert!(Arc::ptr_eq(&config, &cart.server_config()), "the configuration was built again");
    client.write_all(b"still here").await.unwrap();
    let mut buffer = [0; 10];
    server.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"still here");
    let (client, _server) = shake(&web, &cart).await;
    let leaf = &client.get_ref().1.peer_certificates().unwrap()[0];
    let serial = super::cert::Facts::of(leaf).unwrap().serial;
    assert_eq!(serial, cart.cell().current().unwrap().serial());
    assert_ne!(serial, before.serial());
}

#[tokio::test]
async fn an_own_certificate_that_is_missing_or_expired_fails_closed() {
    let id: SpiffeId = CART.parse().unwrap();
    let empty = LocalIdentity::new(id.clone()).unwrap();
    let (_near, far) = duplex(1024);
    let reject = accept(far, &empty, LIMIT).await.unwrap_err();
    assert_eq!(reject.reason, RejectReason::OwnCertificate);
    let leaf = Leaf::of(CART).expired();
    let (chain, key) = ca().issue(&leaf);
    let then = leaf.from + Duration::from_secs(60);
    // The CA's own certificates carry rcgen's default validity, which spans that time.
    let expired = WorkloadCert::new_at(&id, chain, key, &[ca().root()], then).unwrap();
    empty.cell().install(expired);
    let (near, _far) = duplex(1024);
    let reject = connect(near, &empty, &set(&[WEB]), LOOPBACK, LIMIT).await.unwrap_err();
    assert_eq!(reject.reason, RejectReason::OwnCertificate);
}

#[test]
fn a_certificate_that_is_not_ours_is_not_made() {
    let (cart, web): (SpiffeId, SpiffeId) = (CART.parse().unwrap(), WEB.parse().unwrap());
    let root = ca().root();
    let (chain, key) = ca().issue(&Leaf::of(WEB));
    let error =
        WorkloadCert::new(&cart, chain.clone(), key.clone_key(), std::slice::from_ref(&root)).unwrap_err();
    assert!(matches!(error, CertError::WrongIdentity { .. }), "{error}");
    let (_, other_key) = ca().issue(&Leaf::of(WEB));
    let error = WorkloadCert::new(&web, chain.clone(), other_key, std::slice::from_ref(&root)).unwrap_err();
    assert!(matches!(error, CertError::WrongKey { .. }), "{error}");
    let error = WorkloadCert::new(&web, chain.clone(), key.clone_key(), &[TestCa::new().root()]).unwrap_err();
    assert!(matches!(error, CertError::Chain { .. }), "{error}");
    let error = WorkloadCert::new(&web, chain, key, &[]).unwrap_err();
    assert!(matches!(error, CertError::NoRoot(_)), "{error}");
    let error = WorkloadCert::new(&web, vec![], ca().issue(&Leaf::of(WEB)).1, &[root]).unwrap_err();
    assert!(matches!(error, CertError::Empty(_)), "{error}");
}

#[test]
fn client_configurations_are_cached_per_set_and_bounded() {
    let web = ca().identity(WEB);
    let one = web.client_config(&set(&[CART])).unwrap();
    assert!(Arc::ptr_eq(&one, &web.client_config(&set(&[CART])).unwrap()));
    assert!(!Arc::ptr_eq(&one, &web.client_config(&set(&[CART, WEB])).unwrap()));
}
