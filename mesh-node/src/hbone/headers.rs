//! The CONNECT request: what the client puts in and what the server reads from it.
//!
//! `forwarded`, `baggage` and `traceparent` are information for logs and metrics. No decision may rest on them: the
//! peer's certificate and address are what is proven.

use super::error::{HboneError, Refusal};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header::FORWARDED};
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

/// W3C Baggage.
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// W3C Trace Context.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Longest value that we keep from a peer's informational header, in bytes.
const MAX_INFO_HEADER: usize = 4096;

/// Where a tunnel leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A workload's address and port.
    Addr(SocketAddr),
    /// A service's host name and port.
    Host(String, u16),
}

impl Target {
    /// Reads `IP:PORT`, `[IP6]:PORT` or `HOST:PORT`; the port is never 0.
    pub fn parse(authority: &str) -> Option<Self> {
        if let Ok(addr) = authority.parse::<SocketAddr>() {
            return (addr.port() != 0).then_some(Self::Addr(addr));
        }
        let (host, port) = authority.rsplit_once(':')?;
        // `parse` of u16 takes a leading plus sign; an authority has none.
        let port: u16 = port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok())??;
        let label_ok = |label: &str| {
            !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        };
        let host_ok = host.len() <= 253
            && host.split('.').all(label_ok)
            // All digits and dots is a mangled address, not a name.
            && host.bytes().any(|b| b.is_ascii_alphabetic());
        (port != 0 && host_ok).then(|| Self::Host(host.to_ascii_lowercase(), port))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// The `forwarded` header (RFC 7239) in Istio's form: the real client, and the service host it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarded {
    /// The client's address.
    pub client: SocketAddr,
    /// The service host that the client dialled, if it dialled one.
    pub host: Option<String>,
}

impl Forwarded {
    /// Reads the first element of a `forwarded` header.
    pub fn parse(value: &str) -> Option<Self> {
        let mut client = None;
        let mut host = None;
        for pair in value.split(',').next()?.split(';') {
            let (name, value) = pair.split_once('=')?;
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "for" => client = value.parse().ok(),
                "host" => host = Some(value.to_owned()),
                _ => {}
            }
        }
        Some(Self { client: client?, host })
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", self.client)?;
        self.host.as_ref().map_or(Ok(()), |host| write!(f, ";host={host}"))
    }
}

/// The `baggage` header: who the source workload is, for the other side's metrics. Empty strings are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: String,
    /// `k8s.namespace.name`.
    pub namespace: String,
    /// `k8s.KIND.name`: the owner's kind in lower case, for example `deployment`.
    pub workload_kind: String,
    /// `k8s.KIND.name`: the owner's name.
    pub workload: String,
    /// `service.name`: the canonical service.
    pub service: String,
    /// `service.version`: the canonical revision.
    pub revision: String,
    /// `cloud.region`.
    pub region: String,
    /// `cloud.availability_zone`.
    pub zone: String,
}

impl Baggage {
    /// Reads a `baggage` header; keys that we do not know are passed over.
    pub fn parse(value: &str) -> Self {
        let mut baggage = Self::default();
        for member in value.split(',') {
            let Some((key, value)) = member.split(';').next().and_then(|pair| pair.split_once('=')) else {
                continue;
            };
            let value = value.trim().to_owned();
            match key.trim() {
                "k8s.cluster.name" => baggage.cluster = value,
                "k8s.namespace.name" => baggage.namespace = value,
                "service.name" => baggage.service = value,
                "service.version" => baggage.revision = value,
                "cloud.region" => baggage.region = value,
                "cloud.availability_zone" => baggage.zone = value,
                key => {
                    let kind = key.strip_prefix("k8s.").and_then(|k| k.strip_suffix(".name"));
                    if let Some(kind @ ("deployment" | "cronjob" | "pod" | "job")) = kind {
                        kind.clone_into(&mut baggage.workload_kind);
                        baggage.workload = value;
                    }
                }
            }
        }
        baggage
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.workload_kind.is_empty() { "deployment" } else { &self.workload_kind };
        let mut separator = "";
        let mut member = |key: fmt::Arguments<'_>, value: &str| -> fmt::Result {
            // Kubernetes names have no such characters; a label value that has cannot break the header.
            let clean = |b: u8| b.is_ascii_graphic() && !matches!(b, b',' | b';' | b'"' | b'\\' | b'=');
            if value.is_empty() || !value.bytes().all(clean) {
                return Ok(());
            }
            write!(f, "{separator}{key}={value}")?;
            separator = ",";
            Ok(())
        };
        member(format_args!("k8s.cluster.name"), &self.cluster)?;
        member(format_args!("k8s.namespace.name"), &self.namespace)?;
        member(format_args!("k8s.{kind}.name"), &self.workload)?;
        member(format_args!("service.name"), &self.service)?;
        member(format_args!("service.version"), &self.revision)?;
        member(format_args!("cloud.region"), &self.region)?;
        member(format_args!("cloud.availability_zone"), &self.zone)
    }
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// Where the tunnel shall lead; the `:authority`.
    pub target: Target,
    /// The real client.
    pub forwarded: Option<Forwarded>,
    /// Who the source workload is.
    pub baggage: Option<Baggage>,
    /// W3C trace context, passed on as it is.
    pub traceparent: Option<String>,
}

impl Connect {
    /// A tunnel to `target` with nothing else said.
    pub fn to(target: Target) -> Self {
        Self { target, forwarded: None, baggage: None, traceparent: None }
    }

    /// The HTTP/2 request: `CONNECT` with only `:authority`, and the headers.
    pub(super) fn to_request(&self) -> Result<Request<()>, HboneError> {
        let bad = |e: &dyn fmt::Display| HboneError::Request(e.to_string());
        let uri = Uri::builder().authority(self.target.to_string()).build().map_err(|e| bad(&e))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        *request.version_mut() = http::Version::HTTP_2;
        let headers = [
            (BAGGAGE, self.baggage.as_ref().map(ToString::to_string)),
            (FORWARDED, self.forwarded.as_ref().map(ToString::to_string)),
            (TRACEPARENT, self.traceparent.clone()),
        ];
        for (name, value) in headers {
            if let Some(value) = value.filter(|v| !v.is_empty()) {
                let value = HeaderValue::try_from(value).map_err(|e| bad(&e))?;
                request.headers_mut().insert(name, value);
            }
        }
        Ok(request)
    }
}

/// A CONNECT as a server received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Where the tunnel shall lead.
    pub target: Target,
    /// The real client, as the peer tells it.
    pub forwarded: Option<Forwarded>,
    /// Who the source workload is, as the peer tells it.
    pub baggage: Option<Baggage>,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

impl ConnectRequest {
    /// Reads a request. With `local`, an authority that is an address has to be on exactly that address.
    pub(super) fn from_request<B>(request: &Request<B>, local: Option<IpAddr>) -> Result<Self, Refusal> {
        if request.method() != Method::CONNECT {
            return Err(Refusal::Method(request.method().to_string()));
        }
        let authority = request.uri().authority().map(|a| a.as_str()).unwrap_or_default();
        let target = Target::parse(authority).ok_or_else(|| Refusal::Authority(clip(authority)))?;
        if let (Target::Addr(addr), Some(local)) = (&target, local)
            && addr.ip().to_canonical() != local.to_canonical()
        {
            return Err(Refusal::AddressMismatch { authority: addr.to_string(), local });
        }
        let headers = request.headers();
        Ok(Self {
            target,
            forwarded: info(headers, &FORWARDED).and_then(Forwarded::parse),
            baggage: info(headers, &BAGGAGE).map(Baggage::parse),
            traceparent: info(headers, &TRACEPARENT).map(str::to_owned),
        })
    }
}

fn info<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|v| v.len() <= MAX_INFO_HEADER)
}

/// A peer's words, short enough for a log line.
fn clip(s: &str) -> String {
    s.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let addr = |s: &str| Some(Target::Addr(s.parse().unwrap()));
        assert_eq!(Target::parse("10.0.0.1:80"), addr("10.0.0.1:80"));
        assert_eq!(Target::parse("[fd00::1]:80"), addr("[fd00::1]:80"));
        assert_eq!(
            Target::parse("Cart.shop.svc.cluster.local:8080"),
            Some(Target::Host("cart.shop.svc.cluster.local".into(), 8080))
        );
        for bad in [
            "",
            "10.0.0.1",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            ":80",
            "cart",
            "cart:",
            "cart:+80",
            "cart:0",
            "a..b:80",
            "10.0.0.256:80",
            "fd00::1:80",
            "user@cart:80",
            "cart/x:80",
            "cart:80/x",
        ] {
            assert_eq!(Target::parse(bad), None, "{bad:?} was accepted");
        }
    }

    #[test]
    fn forwarded_round_trip() {
        for (client, host, text) in [
            (
                "10.1.2.3:4000",
                Some("cart.shop.svc.cluster.local"),
                "for=\"10.1.2.3:4000\";host=cart.shop.svc.cluster.local",
            ),
            ("[fd00::7]:4000", None, "for=\"[fd00::7]:4000\""),
        ] {
            let value = Forwarded { client: client.parse().unwrap(), host: host.map(str::to_owned) };
            assert_eq!(value.to_string(), text);
            assert_eq!(Forwarded::parse(text), Some(value));
        }
        assert_eq!(Forwarded::parse("for=unknown"), None);
        assert_eq!(Forwarded::parse("nonsense"), None);
    }

    #[test]
    fn baggage_round_trip_and_hostile_values() {
        let text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.job.name=load,service.name=cart,\
                    service.version=v2,cloud.region=eu,cloud.availability_zone=eu-1";
        let baggage = Baggage::parse(text);
        assert_eq!(baggage.workload_kind, "job");
        assert_eq!(baggage.to_string(), text);
        let hostile =
            Baggage { namespace: "a,service.name=evil".into(), service: "cart".into(), ..Baggage::default() };
        assert_eq!(hostile.to_string(), "service.name=cart");
        assert_eq!(Baggage::parse(";;,=,k8s.pod.name"), Baggage::default());
    }

    #[test]
    fn the_request_has_only_an_authority() {
        let request = Connect::to(Target::parse("10.0.0.1:80").unwrap()).to_request().unwrap();
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri().authority().unwrap().as_str(), "10.0.0.1:80");
        assert!(request.uri().scheme().is_none() && request.uri().path_and_query().is_none());
        assert!(request.headers().is_empty());
    }

    #[test]
    fn address_mismatch_is_refused_even_in_mapped_form() {
        let request = Connect::to(Target::parse("10.0.0.1:80").unwrap()).to_request().unwrap();
        let read = |local: &str| ConnectRequest::from_request(&request, Some(local.parse().unwrap()));
        assert!(read("10.0.0.1").is_ok());
        assert!(read("::ffff:10.0.0.1").is_ok());
        let refusal = read("10.0.0.2").unwrap_err();
        assert_eq!((refusal.status().as_u16(), refusal.label()), (400, "address_mismatch"));
    }
}
