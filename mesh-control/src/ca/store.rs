//! Key pairs on disk.
//!
//! Private key and certificate are in one file, so that there is no moment at which only one of them is new. Files are
//! written under another name, synced and renamed. Deliberately absent: encryption of the keys; the directory's
//! permissions guard them, as with kubeadm's.

use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Why a key pair cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading or writing failed.
    #[error(
        "cannot {action} {path}; check that the data directory exists and that its owner runs mesh-control"
    )]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Others can read the key.
    #[error("{path} has mode {mode:o}, so others can read the private key; run: chmod 600 {path}")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Half of the pair is missing or damaged.
    #[error(
        "{path} has no usable {part}; restore the file from a backup, or move it away to start a new CA \
         (every node then needs the new root certificate)"
    )]
    Incomplete {
        /// The file.
        path: PathBuf,
        /// Which half.
        part: &'static str,
    },
    /// Key and certificate do not belong together.
    #[error(
        "the private key in {path} does not belong to the certificate beside it; restore the file from a backup, \
         or move it away to start a new CA (every node then needs the new root certificate)"
    )]
    Mismatch {
        /// The file.
        path: PathBuf,
    },
}

/// A private key and its certificate.
#[derive(Debug)]
pub struct Pair {
    /// The key.
    pub key: KeyPair,
    /// The certificate.
    pub certificate: CertificateDer<'static>,
}

impl Pair {
    /// Reads a pair; `None` when the file does not exist.
    pub fn read(path: &Path) -> Result<Option<Self>, StoreError> {
        let io = |source| StoreError::Io { action: "read", path: path.to_owned(), source };
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
        };
        let mode = fs::metadata(path).map_err(io)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(StoreError::Mode { path: path.to_owned(), mode });
        }
        let incomplete = |part| StoreError::Incomplete { path: path.to_owned(), part };
        let certificate = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|_| incomplete("certificate (-----BEGIN CERTIFICATE-----)"))?;
        let key = rustls_pki_types::PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes())
            .map_err(|_| incomplete("private key (-----BEGIN PRIVATE KEY-----)"))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(|_| incomplete("P-256 private key"))?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&certificate).map_err(|_| incomplete("certificate"))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(StoreError::Mismatch { path: path.to_owned() });
        }
        Ok(Some(Self { key, certificate }))
    }

    /// Writes the pair, readable by its owner only.
    pub fn write(&self, path: &Path) -> Result<(), StoreError> {
        let text = format!("{}{}", self.key.serialize_pem(), pem(&self.certificate));
        write_atomically(path, text.as_bytes(), 0o600)
    }
}

/// A certificate as PEM.
pub(super) fn pem(certificate: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut out = String::with_capacity(text.len() + text.len() / 64 + 60);
    out.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    // Base64 is ASCII, so any split is at a character.
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

/// Replaces a file by way of a synced temporary one in the same directory.
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> Result<(), StoreError> {
    let wrap = |source| StoreError::Io { action: "write", path: path.to_owned(), source };
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = dir.join(name);
    // Left over from a crash; `create_new` below would refuse it.
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(wrap(e)),
        _ => {}
    }
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(dir)?.sync_all()
    };
    write().map_err(wrap)
}
