//! The checkpoint codec: golden bytes, and everything that must be refused.

use super::*;

fn small() -> BaseImage {
    let at = |c, i| Some(Location::new(0, ChunkNo(c), i));
    let mut img = BaseImage::empty(2000);
    img.apply_runs(&[
        Run { block: BlockNo(0), blocks: 512, to: at(1, 0) },
        Run { block: BlockNo(600), blocks: 1, to: at(2, 7) },
        Run { block: BlockNo(700), blocks: 1, to: at(3, 7).map(Location::damaged) },
        Run { block: BlockNo(702), blocks: 1, to: at(0x1234, 7) },
    ]);
    img
}

// Header; leaf 0, one break; leaf 1, a table of blocks 88, 188 (damaged) and 190.
const FULL: &[&str] = &[
    "56424d50 0100 01 00 00000000000000000000000000000007 0900000000000000 00000000 01000000 d007000000000000",
    "0200000000000000 3000000000000000 8319cf37 adc9d47b",
    "00000000 01 00 0100 0004000000000000",
    "01000000 02 00 0300 070800000000002c 070c00000000405e 07d048000000005f",
];
// Header; block 600 to chunk 2, index 7; blocks 700 to 701 unmapped.
const DELTA: &[&str] = &[
    "56424d50 0100 02 00 00000000000000000000000000000007 0900000000000000 00000000 01000000 d007000000000000",
    "0200000000000000 3000000000000000 dba47add e9f4db60",
    "5802000000000000 0708000000000000 01000000 00000000",
    "bc02000000000000 0000000000000000 02000000 00000000",
];

fn hex(b: &[u8]) -> String {
    b.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn golden_bytes() {
    let plain = |lines: &[&str]| lines.concat().replace(' ', "");
    let full: Vec<_> = checkpoint::encode_full(&small(), ident(), 1 << 20).collect();
    assert_eq!(hex(&full[0]), plain(FULL));
    let at = Some(Location::new(0, ChunkNo(2), 7));
    let runs = [Run { block: BlockNo(600), blocks: 1, to: at }, Run { block: BlockNo(700), blocks: 2, to: None }];
    let delta: Vec<_> = checkpoint::encode_delta(&runs, 2000, ident(), 1 << 20).collect();
    assert_eq!(hex(&delta[0]), plain(DELTA));
}

#[test]
fn any_flipped_byte_and_any_cut_is_refused() {
    let full = checkpoint::encode_full(&small(), ident(), 0).next().unwrap();
    let runs: Vec<Run> = small().runs().collect();
    let delta = checkpoint::encode_delta(&runs, 2000, ident(), 0).next().unwrap();
    for (bytes, kind) in [(full, PartKind::Full), (delta, PartKind::Delta)] {
        let e = expect(kind, 0, 1, 2000);
        assert!(checkpoint::decode_part(&bytes, &e).is_ok());
        for i in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bad = bytes.to_vec();
                bad[i] ^= flip;
                assert!(checkpoint::decode_part(&bad, &e).is_err(), "byte {i}");
            }
            assert!(checkpoint::decode_part(&bytes[..i], &e).is_err(), "cut at {i}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(checkpoint::decode_part(&longer, &e).is_err());
    }
}

/// Bytes with checksums made right again, so that the checks behind them are reached.
fn sealed(mut b: Vec<u8>) -> Vec<u8> {
    let n = (b.len() - 72) as u64;
    b[56..64].copy_from_slice(&n.to_le_bytes());
    let crc = crc32fast::hash(&b[72..]);
    b[64..68].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32fast::hash(&b[..68]);
    b[68..72].copy_from_slice(&crc.to_le_bytes());
    b
}

#[test]
fn sealed_nonsense_is_refused() {
    let full = checkpoint::encode_full(&small(), ident(), 0).next().unwrap();
    let e = expect(PartKind::Full, 0, 1, 2000);
    let try_with = |at: usize, to: &[u8]| {
        let mut b = full.to_vec();
        b[at..at + to.len()].copy_from_slice(to);
        checkpoint::decode_part(&sealed(b), &e).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(try_with(0, b"V"), Ok(()));
    for (at, to, says) in [
        (4, &[2][..], "version 2"),
        (6, &[2], "kind is 2"),
        (6, &[3], "kind 3"),
        (7, &[1], "flags 1"),
        (8, &[1], "volume is"),
        (24, &[1], "checkpoint number is 1"),
        (32, &[1], "part is 1"),
        (36, &[2], "number of parts is 2"),
        (40, &[0xd1, 7], "maps 2001 blocks"),
        (40, &[0xb0, 2], "passes the volume's end"),
        (48, &[1], "follow the last leaf"),
        (48, &[3], "cut short"),
        (48, &[0xff; 8], "do not fit"),
        (72, &[1], "out of order"),
        (76, &[9], "form of a leaf 9"),
        (77, &[1], "form of a leaf"),
        (78, &[0], "512 words"),
        (78, &[1, 2], "cut short"),
        (80, &[1], "passes the end of its chunk"),
        (96, &[0; 8], "a location makes no sense"),
    ] {
        let got = try_with(at, to);
        // A run that is one longer than its chunk has room for needs an index of 513 or more.
        let got = if at == 80 { try_with(80, &[1, 6]) } else { got };
        assert!(got.as_ref().is_err_and(|e| e.contains(says)), "{at} {to:?}: {got:?}, not {says}");
    }
    let runs: Vec<Run> = small().runs().collect();
    let delta = checkpoint::encode_delta(&runs, 2000, ident(), 0).next().unwrap();
    let e = expect(PartKind::Delta, 0, 1, 2000);
    for (at, to, says) in [
        (48, &[3][..], "do not make"),
        (48, &[0xff; 8], "do not make"),
        (72, &[0, 9], "run 0 at block 2304"),
        (80, &[0xff; 8], "run 0"),
        (88, &[0; 4], "run 0"),
        (92, &[1], "run 0"),
        (96, &[1, 0], "out of order"),
    ] {
        let mut b = delta.to_vec();
        b[at..at + to.len()].copy_from_slice(to);
        let got = checkpoint::decode_part(&sealed(b), &e).unwrap_err().to_string();
        assert!(got.contains(says), "{at}: {got}, not {says}");
    }
}

#[test]
fn the_builder_wants_every_part_once() {
    let img = small();
    let part = || {
        let p = checkpoint::encode_full(&img, ident(), 0).next().unwrap();
        checkpoint::decode_part(&p, &expect(PartKind::Full, 0, 1, 2000)).unwrap()
    };
    let mut b = ImageBuilder::new(2000);
    assert!(b.delta_part(part()).is_err());
    b.full_part(part()).unwrap();
    assert!(b.full_part(part()).is_err());
    assert!(ImageBuilder::new(1999).full_part(part()).is_err());

    let to = Some(Location::new(0, ChunkNo(1), 0));
    let many: Vec<Run> = (0..400).map(|i| Run { block: BlockNo(i), blocks: 1, to }).collect();
    let parts: Vec<_> = checkpoint::encode_delta(&many, 2000, ident(), 0).collect();
    assert_eq!(parts.len(), 3);
    let mut b = ImageBuilder::new(2000);
    b.delta_part(checkpoint::decode_part(&parts[2], &expect(PartKind::Delta, 2, 3, 2000)).unwrap()).unwrap();
    assert!(b.finish().unwrap_err().to_string().contains("1 of 3 parts"));
    assert!(ImageBuilder::new(5).finish().unwrap().runs().next().is_none());
}

#[test]
fn an_empty_image_is_one_part() {
    let img = BaseImage::empty(1 << 34);
    assert!(recode(&img, 0).runs().next().is_none());
    assert!(BaseImage::diff(&img, &img).is_empty());
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(mut tail in prop::collection::vec(any::<u8>(), 0..300), kind in 1u8..3, records in 0u64..6) {
        let p = checkpoint::encode_full(&BaseImage::empty(1 << 30), ident(), 0).next().unwrap();
        let mut b = p.to_vec();
        b[6] = kind;
        b[48..56].copy_from_slice(&records.to_le_bytes());
        b.append(&mut tail);
        let kind = if kind == 1 { PartKind::Full } else { PartKind::Delta };
        // Must not panic; what is taken must be sound enough to build.
        if let Ok(part) = checkpoint::decode_part(&sealed(b), &expect(kind, 0, 1, 1 << 30)) {
            let mut builder = ImageBuilder::new(1 << 30);
            if kind == PartKind::Full { builder.full_part(part).unwrap() } else { builder.delta_part(part).unwrap() };
            builder.finish().unwrap().runs().count();
        }
    }
}
