//! CRC-32 (IEEE 802.3), against bits that fell over; not against anybody who writes to the file.

const POLYNOMIAL: u32 = 0xedb8_8320;

/// The remainders of every byte followed by zero to seven zero bytes, so that eight bytes go in one step.
const TABLES: [[u32; 256]; 8] = {
    let mut tables = [[0u32; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut rest = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            rest = if rest & 1 == 1 { (rest >> 1) ^ POLYNOMIAL } else { rest >> 1 };
            bit += 1;
        }
        tables[0][byte] = rest;
        byte += 1;
    }
    let mut zeros = 1;
    while zeros < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[zeros - 1][byte];
            tables[zeros][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        zeros += 1;
    }
    tables
};

/// The checksum of `bytes`.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let mut rest = u32::MAX;
    let (eights, tail) = bytes.as_chunks::<8>();
    for chunk in eights {
        let first = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]) ^ rest;
        let [a, b, c, d] = first.to_le_bytes();
        rest = 0;
        for (i, byte) in [a, b, c, d, chunk[4], chunk[5], chunk[6], chunk[7]].into_iter().enumerate() {
            rest ^= TABLES[7 - i][usize::from(byte)];
        }
    }
    for byte in tail {
        rest = (rest >> 8) ^ TABLES[0][usize::from(*byte) ^ (rest & 0xff) as usize];
    }
    !rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(crc32(b""), 0);
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b"The quick brown fox jumps over the lazy dog"), 0x414f_a339);
    }
}
