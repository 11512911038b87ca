use super::*;
use proptest::prelude::*;

use crate::error::ErrorKind;

fn header() -> ChunkHeader {
    let extent = |block, blocks, kind, birth| ChunkExtent { block: BlockNo(block), blocks, kind, birth: Seq(birth) };
    ChunkHeader {
        volume: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
        chunk: ChunkNo(0x1234),
        epoch: Epoch(3),
        nonce: Nonce(0xdead_beef_0000_0001),
        after: Seq(100),
        through: Seq(200),
        group: GroupNo(7),
        index: 1,
        count: 2,
        applied_through: GroupNo(5),
        extents: vec![
            extent(10, 2, ExtentKind::Data, 150),
            extent(12, 1 << 33, ExtentKind::Discard, 151),
            extent((1 << 33) + 12, 1, ExtentKind::Damaged, 90),
            extent((1 << 34) - 1, 1, ExtentKind::Data, 200),
        ],
        crcs: vec![0x0101_0101, 0x0202_0202, 0x0303_0303, 0x0404_0404],
        masks: vec![(2, 0b1010_0000)],
    }
}

fn hex(b: &[u8]) -> String {
    b.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn golden_bytes() {
    let b = header().encode().unwrap();
    assert_eq!(b.len(), HEADER_ROOM);
    let head = [
        "5642434b 0100 0000 00112233445566778899aabbccddeeff 3412000000000000 0300000000000000 01000000efbeadde",
        "6400000000000000 c800000000000000 0700000000000000 01000000 02000000 0500000000000000",
        "01 00 00 00 00000000 01000000 04000000 04000000 01000000 0080000000000000 0040000000000000",
    ];
    let head = head.concat().replace(' ', "");
    assert_eq!(hex(&b[..128]), head);
    assert_eq!(b[128..252], [0; 124]);
    assert_eq!(hex(&b[252..256]), "79fc9c30");
    let extents = [
        "0a00000000000000 9600000000000000 020000000000 01 00",
        "0c00000000000000 9700000000000000 000000000200 02 00",
        "0c00000002000000 5a00000000000000 010000000000 03 00",
        "ffffffff03000000 c800000000000000 010000000000 01 00",
    ];
    assert_eq!(hex(&b[256..256 + 96]), extents.concat().replace(' ', ""));
    assert_eq!(hex(&b[24640..24656]), "01010101020202020303030304040404");
    assert_eq!(hex(&b[28704..28708]), "0200a000");
    assert!([&b[352..24640], &b[24656..28704], &b[28708..]].iter().all(|r| r.iter().all(|b| *b == 0)));
    assert_eq!(ChunkHeader::decode(&b).unwrap(), header());
}

#[test]
fn any_flipped_byte_and_a_cut_are_refused() {
    let mut b = header().encode().unwrap();
    for i in 0..b.len() {
        // A CRC finds every single-byte change; two patterns show that no byte is left out.
        for flip in [1, 0xff] {
            b[i] ^= flip;
            let e = ChunkHeader::decode(&b).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Corrupt, "byte {i}: {e}");
            b[i] ^= flip;
        }
    }
    assert!(ChunkHeader::decode(&b[..HEADER_ROOM - 1]).is_err());
    assert!(ChunkHeader::decode(&[]).is_err());
    b.push(9);
    assert!(ChunkHeader::decode(&b).is_ok(), "the data behind it is not its business");
}

#[test]
fn sealed_nonsense_is_refused() {
    for (at, to, says) in [
        (0, &[b'X'][..], "magic"),
        (4, &[2], "version 2"),
        (6, &[1], "flags 1"),
        (24, &[0; 8], "chunk number 0"),
        (29, &[1], "chunk number"),
        (36, &[1], "epoch"),
        (48, &[201], "backwards"),
        (72, &[2], "chunk 2 of 2"),
        (88, &[2], "checksum kind 2"),
        (89, &[1], "codec 1"),
        (90, &[1], "cipher 1"),
        (91, &[1], "unused room"),
        (92, &[1], "key id 1"),
        (96, &[2], "number of frames 2"),
        (100, &[0xf9, 3], "1017 extents"),
        (100, &[0xff; 4], "extents"),
        (100, &[5], "kind of an extent 0"),
        (100, &[3], "unused room"),
        (104, &[5], "its frame"),
        (108, &[5], "5 masks"),
        (108, &[2], "block 0 has a mask"),
        (112, &[1], "its frame"),
        (121, &[0x50], "its frame"),
        (128, &[1], "unused room"),
        (251, &[1], "unused room"),
        (256, &[0xff], "out of order"),
        (272, &[0], "out of order"),
        (272, &[5], "more than its 4 stored blocks"),
        (277, &[1], "out of order"),
        (278, &[4], "kind of an extent 4"),
        (279, &[1], "kind of an extent"),
        (302, &[3], "more than its 4 stored blocks"),
        (278, &[2], "has no mask"),
        (350, &[2], "name 3 stored blocks"),
        (326, &[1], "block 2 has a mask"),
        (352, &[1], "unused room"),
        (24656, &[1], "unused room"),
        (28704, &[1], "block 2 has no mask"),
        (28707, &[1], "unused room"),
        (32767, &[1], "unused room"),
    ] {
        let mut b = header().encode().unwrap();
        b[at..at + to.len()].copy_from_slice(to);
        let crc = header_crc(&b);
        b[CRC_AT..EXTENTS_AT].copy_from_slice(&crc.to_le_bytes());
        let got = ChunkHeader::decode(&b).map(|_| ()).map_err(|e| e.to_string());
        assert!(got.as_ref().is_err_and(|e| e.contains(says)), "{at} {to:?}: {got:?}, not {says}");
    }
}

#[test]
fn what_breaks_the_rules_is_not_written() {
    let refused = |f: &dyn Fn(&mut ChunkHeader)| {
        let mut h = header();
        f(&mut h);
        h.encode().unwrap_err()
    };
    refused(&|h| h.crcs.push(0));
    refused(&|h| h.masks.clear());
    refused(&|h| h.extents.swap(0, 1));
    refused(&|h| h.extents[3].blocks = u64::MAX);
    refused(&|h| h.epoch = Epoch(1 << 32));
    refused(&|h| {
        h.extents = (0..1017)
            .map(|i| ChunkExtent { block: BlockNo(i * 2), blocks: 1, kind: ExtentKind::Discard, birth: Seq(1) })
            .collect();
        (h.crcs, h.masks) = (vec![], vec![]);
    });
}

#[test]
fn the_worst_case_fits() {
    let mut h = header();
    h.extents = (0..1016)
        .map(|i| ChunkExtent { block: BlockNo(i * 2), blocks: 1, kind: ExtentKind::Damaged, birth: Seq(u64::MAX) })
        .collect();
    h.crcs = vec![u32::MAX; 1016];
    h.masks = (0..1016).map(|i| (i, 0x7f)).collect();
    assert!(ChunkHeader::fits(1016, 1016, 1016) && !ChunkHeader::fits(1, 1017, 0) && !ChunkHeader::fits(1017, 0, 0));
    assert_eq!(ChunkHeader::decode(&h.encode().unwrap()).unwrap(), h);
    // A chunk written by garbage collection may hold nothing of any group, and one extent may be everything.
    h.group = GroupNo(0);
    (h.index, h.count) = (0, 0);
    h.extents = vec![ChunkExtent { block: BlockNo(5), blocks: 1016, kind: ExtentKind::Data, birth: Seq(1) }];
    h.masks.clear();
    assert_eq!(ChunkHeader::decode(&h.encode().unwrap()).unwrap(), h);
}

#[test]
fn a_block_s_checksum_knows_its_address() {
    let data = [7; BLOCK];
    assert_ne!(block_crc(BlockNo(1), &data), block_crc(BlockNo(2), &data));
    let mut whole = 1u64.to_le_bytes().to_vec();
    whole.extend_from_slice(&data);
    assert_eq!(block_crc(BlockNo(1), &data), crc32fast::hash(&whole));
}

#[test]
fn keys_come_back_and_nothing_else_does() {
    let k = key("p/vol/", ChunkNo(0xab), Epoch(2), Nonce(0xcd));
    assert_eq!(k, "p/vol/chunks/00000000000000ab-00000002-00000000000000cd.chunk");
    assert_eq!(parse_name(k.rsplit('/').next().unwrap()), Some((ChunkNo(0xab), Epoch(2), Nonce(0xcd))));
    for no in [
        "",
        "chunks/",
        k.as_str(),
        "x/00000000000000ab-00000002-00000000000000cd.chunk",
        "00000000000000ab-00000002-00000000000000cd",
        "00000000000000AB-00000002-00000000000000cd.chunk",
        "0000000000000000-00000002-00000000000000cd.chunk",
        "f0000000000000ab-00000002-00000000000000cd.chunk",
        "ab-2-cd.chunk",
        "+0000000000000ab-00000002-00000000000000cd.chunk",
        "00000000000000ab-00000002-00000000000000cd-0.chunk",
        "00000000000000ab-00000002-00000000000000cd.chunk.tmp",
    ] {
        assert_eq!(parse_name(no), None, "{no}");
    }
}

fn any_header() -> impl Strategy<Value = ChunkHeader> {
    let extent = (1u64..2000, 1u64..30, 0u8..3, any::<u64>());
    let ids = (any::<u128>(), 1..=MAX_CHUNK, any::<u32>(), any::<u64>(), any::<[u64; 2]>(), any::<[u64; 2]>());
    (prop::collection::vec(extent, 0..200), ids, any::<u32>(), any::<u8>()).prop_map(|(extents, ids, crc, good)| {
        let (volume, chunk, epoch, nonce, mut range, groups) = ids;
        range.sort_unstable();
        let mut h = ChunkHeader {
            volume: Uuid::from_u128(volume),
            chunk: ChunkNo(chunk),
            epoch: Epoch(epoch.into()),
            nonce: Nonce(nonce),
            after: Seq(range[0]),
            through: Seq(range[1]),
            group: GroupNo(groups[0]),
            index: crc / 2,
            count: crc / 2 + 1,
            applied_through: GroupNo(groups[1]),
            extents: vec![],
            crcs: vec![],
            masks: vec![],
        };
        let mut at = 0;
        for (gap, blocks, kind, birth) in extents {
            let kind = [ExtentKind::Data, ExtentKind::Discard, ExtentKind::Damaged][usize::from(kind)];
            let blocks = if kind.stores() { blocks } else { blocks << 20 };
            if kind.stores() && h.crcs.len() + blocks as usize > MAX_BLOCKS {
                break;
            }
            at += gap - 1;
            h.extents.push(ChunkExtent { block: BlockNo(at), blocks, kind, birth: Seq(birth) });
            at += blocks;
            for _ in 0..if kind.stores() { blocks } else { 0 } {
                if kind == ExtentKind::Damaged {
                    h.masks.push((h.crcs.len() as u16, good));
                }
                h.crcs.push(crc.wrapping_mul(h.crcs.len() as u32 + 1));
            }
        }
        h
    })
}

proptest! {
    #[test]
    fn what_is_written_comes_back(h in any_header()) {
        let b = h.encode().unwrap();
        prop_assert_eq!(b.len(), HEADER_ROOM);
        prop_assert_eq!(ChunkHeader::decode(&b).unwrap(), h);
    }

    #[test]
    fn any_sealed_bytes_are_decoded_or_refused(noise in prop::collection::vec((0usize..32768, any::<u8>()), 0..8)) {
        let mut b = header().encode().unwrap();
        for (at, to) in noise {
            b[at] = to;
        }
        let crc = header_crc(&b);
        b[CRC_AT..EXTENTS_AT].copy_from_slice(&crc.to_le_bytes());
        // What is taken is written back as it was: nothing is lost, nothing has two forms.
        if let Ok(h) = ChunkHeader::decode(&b) {
            prop_assert_eq!(h.encode().unwrap(), b);
        }
    }
}
