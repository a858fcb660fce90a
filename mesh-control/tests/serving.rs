//! The real binary, seen from the outside: a client like ztunnel on its discovery and certificate endpoints.

#![allow(clippy::unwrap_used)] // helpers of tests, outside of #[test] functions

use hyper_util::rt::TokioIo;
use mesh_xds::{
    convert::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Address, decode_address},
    wire::{
        ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
        core::Node,
        discovery::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Channel, Endpoint},
};

const N1: &str = "token-of-the-first-node";
const N2: &str = "token-of-the-second-node";
const LIMIT: Duration = Duration::from_secs(30);

const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, serviceAccountName: web, containers: []}
status: {podIP: 10.244.1.5, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: starting, namespace: shop}
spec: {nodeName: n1, containers: []}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
"#;

/// A running mesh-control; killed when it is dropped.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
    xds: SocketAddr,
    admin: SocketAddr,
    metrics: SocketAddr,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("config")).unwrap();
        fs::write(path("config/objects.yaml"), OBJECTS).unwrap();
        let mut tokens =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path("tokens")).unwrap();
        writeln!(tokens, "n1 {N1}\nn2 {N2}").unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-control"))
            .arg("run")
            .args(["--config-dir".as_ref(), path("config").as_os_str()])
            .args(["--data-dir".as_ref(), path("data").as_os_str()])
            .args(["--node-tokens".as_ref(), path("tokens").as_os_str()])
            .args([
                "--xds-addr",
                "127.0.0.1:0",
                "--admin-addr",
                "127.0.0.1:0",
                "--metrics-addr",
                "127.0.0.1:0",
            ])
            .args(["--log-json", "--log", "info"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = Vec::new();
        let fields = loop {
            let Some(Ok(line)) = lines.next() else { panic!("it ended early:\n{}", seen.join("\n")) };
            let value: serde_json::Value = serde_json::from_str(&line).unwrap();
            if value["fields"]["message"] == "serving" {
                break value["fields"].clone();
            }
            seen.push(line);
        };
        // Keeps the pipe from filling up.
        std::thread::spawn(move || lines.for_each(drop));
        let addr = |name: &str| fields[name].as_str().unwrap().parse().unwrap();
        let (xds, admin, metrics) = (addr("xds"), addr("admin"), addr("metrics"));
        Self { child, dir, xds, admin, metrics }
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("config")
    }

    fn root(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.dir.path().join("data/root-cert.pem")).unwrap()
    }

    fn get(&self, addr: SocketAddr, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    /// The value of a metric, by its name with labels.
    fn metric(&self, name: &str) -> u64 {
        let (_, text) = self.get(self.metrics, "/metrics");
        let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.map_or(0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
    }

    /// A connection that trusts our root alone and asks for the name that ztunnel asks for.
    async fn channel(&self) -> Channel {
        let mut roots = RootCertStore::empty();
        roots.add(self.root()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
        let addr = self.xds;
        Endpoint::from_static("http://istiod.istio-system.svc:15012")
            .connect_with_connector(tower::service_fn(move |_: http::Uri| {
                let tls = tls.clone();
                async move {
                    let stream = tokio::net::TcpStream::connect(addr).await?;
                    let name = ServerName::try_from("istiod.istio-system.svc").unwrap();
                    tls.connect(name, stream).await.map(TokioIo::new)
                }
            }))
            .await
            .unwrap()
    }

    async fn certificate(
        &self,
        token: Option<&str>,
        impersonated: Option<&str>,
        csr: &str,
    ) -> Result<Vec<String>, Status> {
        let fields = impersonated.map(|identity| {
            let value = Value { kind: Some(Kind::StringValue(identity.to_owned())) };
            BTreeMap::from([("ImpersonatedIdentity".to_owned(), value)])
        });
        let request = IstioCertificateRequest {
            csr: csr.to_owned(),
            validity_duration: 86_400,
            metadata: fields.map(|fields| Struct { fields }),
        };
        let mut client = IstioCertificateServiceClient::new(self.channel().await);
        let response = client.create_certificate(with_token(request, token)).await?;
        Ok(response.into_inner().cert_chain)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn with_token<T>(message: T, token: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    request
}

/// A discovery stream that acknowledges what it gets.
struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    async fn open(server: &Server, token: Option<&str>, type_url: &str) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(16);
        let first = DeltaDiscoveryRequest {
            node: Some(Node {
                id: "ztunnel~10.0.0.7~ztunnel-x.istio-system~istio-system.svc.cluster.local".into(),
                ..Node::default()
            }),
            type_url: type_url.into(),
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(server.channel().await);
        let responses =
            client.delta_aggregated_resources(with_token(ReceiverStream::new(receiver), token)).await?;
        Ok(Self { requests, responses: responses.into_inner() })
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let response =
            tokio::time::timeout(LIMIT, self.responses.message()).await.expect("no response in time")?;
        let response = response.ok_or_else(|| Status::cancelled("ended"))?;
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        let _ = self.requests.send(ack).await;
        Ok(response)
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    let mut names: Vec<_> = response.resources.iter().map(|r| r.name.as_str()).collect();
    names.sort_unstable();
    names
}

const WEB: &str = "Kubernetes//Pod/shop/web-1";

#[tokio::test]
async fn a_client_like_ztunnel_follows_the_configuration() {
    let server = Server::start();
    let mut stream = Stream::open(&server, Some(N1), ADDRESS_TYPE).await.unwrap();
    let first = stream.next().await.unwrap();
    // The pod without an address is for clients that understand it.
    assert_eq!(names(&first), [WEB, "shop/web.shop.svc.cluster.local"]);
    let resource = first.resources.iter().find(|r| r.name == WEB).unwrap();
    let Address::Workload(web) = decode_address(WEB, resource.resource.as_ref().unwrap()).unwrap().value
    else {
        panic!("not a workload")
    };
    assert!(web.in_mesh());
    assert_eq!(web.policies, ["istio-system/istio_converted_static_strict"]);
    assert!(resource.aliases.contains(&"/10.244.1.5".to_owned()), "{:?}", resource.aliases);

    // What depends on a change is sent again and nothing else. A broken object stays as it was. What goes is removed.
    let file = server.config().join("objects.yaml");
    fs::write(&file, OBJECTS.replace("targetPort: 8080", "targetPort: 9090")).unwrap();
    assert_eq!(names(&stream.next().await.unwrap()), [WEB, "shop/web.shop.svc.cluster.local"]);
    fs::write(
        &file,
        OBJECTS.replace("status: \"True\"", "status: \"False\"").replace("port: 80,", "port: 0,"),
    )
    .unwrap();
    assert_eq!(names(&stream.next().await.unwrap()), [WEB]);
    let (_, report) = server.get(server.admin, "/debug/report");
    assert!(report.contains("0 is not a port"), "{report}");
    fs::remove_file(&file).unwrap();
    let mut gone = stream.next().await.unwrap().removed_resources;
    gone.sort();
    assert_eq!(gone, [WEB, "shop/web.shop.svc.cluster.local"]);
}

#[tokio::test]
async fn policies_are_served_in_istios_form() {
    let server = Server::start();
    let mut stream = Stream::open(&server, Some(N2), AUTHORIZATION_TYPE).await.unwrap();
    let first = stream.next().await.unwrap();
    assert_eq!(names(&first), ["istio-system/istio_converted_static_strict"]);
}

#[tokio::test]
async fn without_a_token_there_is_nothing() {
    let server = Server::start();
    for token in [None, Some("not-a-token-of-anybody")] {
        let code = match Stream::open(&server, token, ADDRESS_TYPE).await {
            Ok(mut stream) => stream.next().await.unwrap_err().code(),
            Err(status) => status.code(),
        };
        assert_eq!(code, Code::Unauthenticated, "{token:?}");
    }
    assert_eq!(server.metric("nodemesh_control_streams_refused_total{listener=\"tls\"}"), 2);
}

fn csr(identity: &str) -> String {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.subject_alt_names = vec![SanType::URI(identity.to_owned().try_into().unwrap())];
    params.serialize_request(&key).unwrap().pem().unwrap()
}

#[tokio::test]
async fn certificates_for_the_pods_of_a_node() {
    let server = Server::start();
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let chain = server.certificate(Some(N1), Some(web), &csr(web)).await.unwrap();
    assert_eq!(chain.len(), 3);
    assert_eq!(CertificateDer::from_pem_slice(chain[2].as_bytes()).unwrap(), server.root());
    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(san.value.general_names, [x509_parser::extensions::GeneralName::URI(web)]);

    let pay = "spiffe://cluster.local/ns/shop/sa/pay";
    for (token, impersonated, csr, code, reason) in [
        (None, Some(web), csr(web), Code::Unauthenticated, "no_token"),
        (Some("guess"), Some(web), csr(web), Code::Unauthenticated, "unknown_token"),
        (Some(N2), Some(web), csr(web), Code::PermissionDenied, "not_on_node"),
        (Some(N1), Some(pay), csr(pay), Code::PermissionDenied, "not_on_node"),
        (Some(N1), Some(web), csr(pay), Code::PermissionDenied, "csr_mismatch"),
        (Some(N1), None, csr(web), Code::InvalidArgument, "no_impersonation"),
        (Some(N1), Some(web), "junk".to_owned(), Code::InvalidArgument, "csr"),
    ] {
        let metric = format!("nodemesh_control_certificates_refused_total{{reason=\"{reason}\"}}");
        let before = server.metric(&metric);
        let status = server.certificate(token, impersonated, &csr).await.unwrap_err();
        assert_eq!(status.code(), code, "{reason}: {status}");
        assert!(!status.message().is_empty());
        assert_eq!(server.metric(&metric), before + 1, "{reason}");
    }
    assert_eq!(server.metric("nodemesh_control_certificates_issued_total"), 1);
}

#[tokio::test]
async fn a_signal_ends_it_with_streams_open() {
    let mut server = Server::start();
    let mut stream = Stream::open(&server, Some(N1), ADDRESS_TYPE).await.unwrap();
    stream.next().await.unwrap();
    assert!(server.get(server.admin, "/healthz").0.contains("200"));
    assert!(server.get(server.metrics, "/healthz").0.contains("200"));
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(stream.next().await.is_err(), "the stream has to end");
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = server.child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "it is still running");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(status.success(), "{status}");
}

fn check(dir: &Path) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_mesh-control")).arg("check").arg(dir).output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn check_says_what_is_wrong_and_where() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), OBJECTS).unwrap();
    let (code, text) = check(dir.path());
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("2 Pod") && text.contains("0 errors"), "{text}");
    fs::write(
        dir.path().join("b.yaml"),
        "\n\nkind: Service\napiVersion: v1\nmetadata: {name: s}\nspec:\n  clusterIP: 1\n",
    )
    .unwrap();
    let (code, text) = check(dir.path());
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("b.yaml:7: error: Service default/s: spec.clusterIP: "), "{text}");
    assert_eq!(check(&dir.path().join("none")).0, Some(1));
}

#[test]
fn the_quick_start_has_no_problems() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/quickstart");
    let (code, text) = check(&dir);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("0 errors, 0 warnings"), "{text}");
}
