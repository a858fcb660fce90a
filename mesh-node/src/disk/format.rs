//! The file of the configuration: a header, the snapshot's frames, the frames that were appended since.
//!
//! A frame is length, checksum and records. The snapshot was complete when the file got its name, so any fault in it
//! condemns the file. An appended frame may be cut off by a crash; it and what follows it are left out, and what is read
//! is then the configuration of a moment earlier, whole.

use super::crc::crc32;
use bytes::Bytes;
use std::io::{self, Read, Seek, SeekFrom, Write};

const MAGIC: [u8; 8] = *b"nodemesh";
/// The form described above. A file of another one is refused.
pub(super) const FORMAT: u32 = 1;
/// Magic, format, end of the snapshot, checksum.
pub(super) const HEADER: usize = 24;
/// Length and checksum.
const FRAME: usize = 8;

/// Why a file cannot be read as a configuration.
#[derive(Debug, thiserror::Error)]
pub(super) enum FormatError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is not a configuration of nodemesh")]
    Foreign,
    #[error("it has format {0}, and this version reads format {FORMAT}")]
    Version(u32),
    #[error("it is cut off at byte {0}")]
    Truncated(u64),
    #[error("the checksum at byte {0} does not hold")]
    Checksum(u64),
}

/// Writes a header; the snapshot ends at `end`.
pub(super) fn write_header(out: &mut impl Write, end: u64) -> io::Result<()> {
    let mut header = [0u8; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    header[12..20].copy_from_slice(&end.to_le_bytes());
    let sum = crc32(&header[..20]);
    header[20..].copy_from_slice(&sum.to_le_bytes());
    out.write_all(&header)
}

/// Appends a frame; gives its bytes.
pub(super) fn write_frame(out: &mut impl Write, payload: &[u8]) -> io::Result<u64> {
    let len = u32::try_from(payload.len())
        .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "a change of more than 4 GiB"))?;
    out.write_all(&len.to_le_bytes())?;
    out.write_all(&crc32(payload).to_le_bytes())?;
    out.write_all(payload)?;
    Ok((FRAME + payload.len()) as u64)
}

/// Reads the frames of a file one after the other.
pub(super) struct Frames<R> {
    from: R,
    at: u64,
    snapshot_end: u64,
    len: u64,
    /// Bytes at the end that are no whole frame; known once the end was reached.
    pub(super) torn: u64,
}

impl<R: Read + Seek> Frames<R> {
    pub(super) fn new(mut from: R) -> Result<Self, FormatError> {
        let len = from.seek(SeekFrom::End(0))?;
        from.rewind()?;
        let mut header = [0u8; HEADER];
        if len < HEADER as u64 {
            return Err(if len < 8 { FormatError::Foreign } else { FormatError::Truncated(len) });
        }
        from.read_exact(&mut header)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if header[..8] != MAGIC {
            return Err(FormatError::Foreign);
        }
        if word(8) != FORMAT {
            return Err(FormatError::Version(word(8)));
        }
        if word(20) != crc32(&header[..20]) {
            return Err(FormatError::Checksum(20));
        }
        let snapshot_end = u64::from(word(12)) | u64::from(word(16)) << 32;
        if snapshot_end > len {
            return Err(FormatError::Truncated(len));
        }
        Ok(Self { from, at: HEADER as u64, snapshot_end, len, torn: 0 })
    }

    /// The next frame; `None` at the end, or where an appended frame was cut off.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, FormatError> {
        let left = self.len - self.at;
        if left == 0 {
            return Ok(None);
        }
        match self.frame(left) {
            Ok(payload) => Ok(Some(payload)),
            Err(FormatError::Io(error)) => Err(FormatError::Io(error)),
            Err(_) if self.at >= self.snapshot_end => {
                self.torn = left;
                self.len = self.at;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn frame(&mut self, left: u64) -> Result<Bytes, FormatError> {
        let mut head = [0u8; FRAME];
        if left < FRAME as u64 {
            return Err(FormatError::Truncated(self.at));
        }
        self.from.read_exact(&mut head)?;
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let sum = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        // Checked against the file before anything is allocated. No frame is empty; zeros are what a file system
        // leaves of data that a power cut kept it from writing.
        if len == 0 || u64::from(len) > left - FRAME as u64 {
            return Err(FormatError::Truncated(self.at));
        }
        let mut payload = vec![0u8; len as usize];
        self.from.read_exact(&mut payload)?;
        if crc32(&payload) != sum {
            return Err(FormatError::Checksum(self.at));
        }
        self.at += (FRAME + payload.len()) as u64;
        Ok(payload.into())
    }
}

/// Rewrites the header of a file whose snapshot is complete now.
pub(super) fn seal(file: &mut (impl Write + Seek), end: u64) -> io::Result<()> {
    file.rewind()?;
    write_header(file, end)?;
    file.seek(SeekFrom::End(0))?;
    Ok(())
}
