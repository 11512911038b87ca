//! The maps against a flat array: what each sector holds is written down beside them, and every lookup is
//! followed to the content it names.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use model::{Model, NoPins};
use proptest::prelude::*;
use uuid::Uuid;

mod codec;
mod model;

use super::checkpoint::{self, Expect, Ident, PartKind};
use super::image::Counts;
use super::leaf::Leaf;
use super::*;
use crate::units::ChunkNo;

/// 66 leaves (0 and 64 share a shard) and a piece that ends inside a block.
const SECTORS: u64 = 66 * LEAF_SECTORS + 1003;
const BLOCKS: u64 = SECTORS.div_ceil(8);

/// The documented bound on the base's memory, from the leaves themselves.
fn check_bound(img: &BaseImage, stats: &MapStats) {
    let (mut heap, mut allocated, mut mapped) = (0, 0, 0);
    let mut pages = BTreeSet::new();
    for (l, leaf) in img.leaves(0..u64::MAX) {
        pages.insert((l % 64, l / 64 / 32));
        heap += leaf.heap_bytes() as u64;
        allocated += u64::from(leaf.heap_bytes() > 0);
        mapped += leaf.mapped() as u64;
    }
    let page = (16 + 32 * size_of::<Leaf>() as u64 + 8).next_multiple_of(16);
    let directory = 64 * img.leaf_count().div_ceil(2048) * 8;
    assert_eq!(stats.base_bytes, heap + page * pages.len() as u64 + directory, "every byte is counted");
    // A leaf's chunks are no farther apart than the volume's.
    let chunks = || img.runs().filter_map(|r| r.to).map(|at| at.raw() >> 10);
    let bits = 19 + 64 - u64::from((1 + chunks().max().unwrap_or(0) - chunks().min().unwrap_or(0)).leading_zeros());
    let bound = bits * mapped / 8 + 48 * allocated + 800 * pages.len() as u64 + directory;
    assert!(stats.base_bytes <= bound, "{} bytes, bound {bound}", stats.base_bytes);
}

fn ident() -> Ident {
    Ident { volume: Uuid::from_u128(7), number: 9 }
}

fn expect(kind: PartKind, part: usize, parts: usize, volume_blocks: u64) -> Expect {
    Expect { ident: ident(), kind, part: part as u32, parts: parts as u32, volume_blocks }
}

/// Writes an image and reads it back, parts in reverse.
fn recode(img: &BaseImage, max_part: usize) -> BaseImage {
    let parts = checkpoint::encode_full(img, ident(), max_part);
    let (n, total) = (parts.total_parts(), parts.total_bytes());
    let parts: Vec<_> = parts.collect();
    assert_eq!(parts.len(), n);
    assert_eq!(parts.iter().map(|p| p.len() as u64).sum::<u64>(), total);
    let mut b = ImageBuilder::new(img.volume_blocks());
    for (i, p) in parts.iter().enumerate().rev() {
        assert!(p.len() <= max_part.max(checkpoint::MIN_PART_BYTES));
        let e = expect(PartKind::Full, i, n, img.volume_blocks());
        b.full_part(checkpoint::decode_part(p, &e).unwrap()).unwrap();
    }
    let back = b.finish().unwrap();
    assert!(back.runs().eq(img.runs()));
    assert_eq!(counts(&back), counts(img), "decoding chooses the same forms");
    back
}

fn counts(img: &BaseImage) -> (u64, u64, LeafForms) {
    (0..SHARDS).map(|s| img.shard(s).counts).fold(Default::default(), |(m, b, f), c: Counts| {
        let f2 = c.forms;
        let forms = LeafForms {
            run: f.run + f2.run,
            pair: f.pair + f2.pair,
            runs: f.runs + f2.runs,
            table: f.table + f2.table,
        };
        (m + c.mapped, b + c.bytes, forms)
    })
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Hole(u64, u64),
    Group(usize, u64, bool),
    Check(u64, u64),
    Reattach(usize),
    Image,
}

/// Sectors near a few places: leaves 0 to 2, the turn to leaf 64, and the volume's end.
fn place_of() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..3 * LEAF_SECTORS, 2 => 63 * LEAF_SECTORS..66 * LEAF_SECTORS, 1 => SECTORS - 1100..SECTORS, 1 => 0..SECTORS]
}

fn range(len: impl Strategy<Value = u64>) -> impl Strategy<Value = (u64, u64)> {
    (place_of(), len, any::<bool>()).prop_map(|(at, len, whole)| {
        let (at, len) = if whole { (at & !7, (len + 7) & !7) } else { (at, len) };
        (at, len.min(SECTORS - at))
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => range(prop_oneof![1u64..24, 1u64..600, 1u64..9000]).prop_map(|(a, n)| Op::Write(a, n)),
        3 => range(prop_oneof![1u64..24, 1u64..9000, 1u64..SECTORS]).prop_map(|(a, n)| Op::Hole(a, n)),
        3 => (1usize..12, prop_oneof![1u64..9, Just(1016)], any::<bool>()).prop_map(|(n, c, d)| Op::Group(n, c, d)),
        4 => range(prop_oneof![1u64..64, 1u64..20_000]).prop_map(|(a, n)| Op::Check(a, n)),
        1 => any::<usize>().prop_map(Op::Reattach),
        1 => Just(Op::Image),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn the_maps_agree_with_a_flat_array(ops in prop::collection::vec(op(), 1..60)) {
        let mut m = Model::new();
        let mut image = m.maps.base_image();
        let mut known: Vec<Run> = Vec::new();
        for op in ops {
            match op {
                Op::Write(a, n) => m.entry(a, n, false),
                Op::Hole(a, n) => m.entry(a, n, true),
                Op::Group(n, c, d) => {
                    if let Some(g) = m.pack(n, c, d) {
                        let mut laid = m.maps.base_image();
                        laid.apply_extents(&g.extents);
                        m.maps.apply_group(&g);
                        prop_assert!(BaseImage::diff(&laid, &m.maps.base_image()).is_empty());
                    }
                }
                Op::Check(a, n) => m.check(a, n),
                Op::Reattach(when) => m.reattach(when),
                Op::Image => {
                    prop_assert!(image.runs().eq(known.iter().copied()), "an image does not change");
                    let new = m.maps.base_image();
                    let diff = BaseImage::diff(&image, &new);
                    let parts: Vec<_> = checkpoint::encode_delta(&diff, BLOCKS, ident(), 0).collect();
                    let mut b = ImageBuilder::new(BLOCKS);
                    let fulls: Vec<_> = checkpoint::encode_full(&image, ident(), 0).collect();
                    for (i, p) in fulls.iter().enumerate() {
                        b.full_part(checkpoint::decode_part(p, &expect(PartKind::Full, i, fulls.len(), BLOCKS)).unwrap()).unwrap();
                    }
                    for (i, p) in parts.iter().enumerate().rev() {
                        b.delta_part(checkpoint::decode_part(p, &expect(PartKind::Delta, i, parts.len(), BLOCKS)).unwrap()).unwrap();
                    }
                    let built = b.finish().unwrap();
                    prop_assert!(BaseImage::diff(&built, &new).is_empty());
                    prop_assert!(built.runs().eq(new.runs()));
                    known = new.runs().collect();
                    image = new;
                }
            }
            m.check_totals();
        }
        m.check(0, SECTORS);
        // All packed: nothing of the overlay is left, and the base alone says it all.
        if let Some(g) = m.pack(usize::MAX, 1016, false) {
            m.maps.apply_group(&g);
        }
        m.check(0, SECTORS);
        prop_assert_eq!(m.maps.stats().overlay_extents, 0);
        m.check_totals();
    }
}

#[test]
fn a_discard_of_a_huge_volume_costs_what_it_holds() {
    let sectors = 2u64 << 40 >> 9;
    let maps = Maps::new(sectors);
    let at = |chunk: u64| Some(Location::new(0, ChunkNo(chunk), 0));
    let extents: Vec<_> =
        (0..100).map(|i| GroupExtent { block: BlockNo(i * 5_000_000), blocks: 3, to: at(i + 1) }).collect();
    maps.apply_group(&GroupUpdate { last: Seq(1), extents, touched: vec![] });
    let write = |lba, seq| {
        maps.apply_entry(&Entry { lba: Lba(lba), sectors: 8, seq: Seq(seq), kind: EntryKind::Data(LogBlock(1)) });
    };
    (0..100).for_each(|i| write(i * 999_999, i + 2));
    let start = std::time::Instant::now();
    maps.apply_entry(&Entry { lba: Lba(0), sectors, seq: Seq(200), kind: EntryKind::Hole });
    let mut out = Vec::new();
    maps.lookup(Lba(0), 1 << 24, &NoPins, &mut out);
    assert_eq!(out, [Piece { lba: Lba(0), sectors: 1 << 24, what: Source::Zero }]);
    let s = maps.stats();
    assert!((100..=200).contains(&s.overlay_extents), "one extent for each leaf that holds something: {s:?}");
    let unmap = GroupExtent { block: BlockNo(0), blocks: sectors / 8, to: None };
    let touched = vec![(BlockNo(0), sectors / 8)];
    maps.apply_group(&GroupUpdate { last: Seq(200), extents: vec![unmap], touched });
    let took = start.elapsed();
    let s = maps.stats();
    assert_eq!((s.overlay_extents, s.mapped_blocks, s.leaves), (0, 0, LeafForms::default()));
    assert!(took.as_millis() < 1000, "{took:?}");
}

#[test]
fn a_reader_sees_the_old_or_the_new_state_of_a_leaf() {
    let maps = Maps::new(LEAF_SECTORS);
    let write = |n: u64| {
        let kind = EntryKind::Data(LogBlock(n as u32 * 512));
        maps.apply_entry(&Entry { lba: Lba(0), sectors: LEAF_SECTORS, seq: Seq(n), kind });
    };
    write(1);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let reader = s.spawn(|| {
            let mut newest = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let mut out = Vec::new();
                maps.lookup(Lba(0), LEAF_SECTORS, &NoPins, &mut out);
                assert_eq!(out.len(), 1, "{out:?}");
                let n = match out[0].what {
                    Source::Log { seq, .. } => seq.0,
                    Source::Chunk(at) => at.chunk().0,
                    other => panic!("{other:?}"),
                };
                assert!(n >= newest, "{n} after {newest}");
                newest = n;
            }
            newest
        });
        for n in 1..20_000 {
            let to = Some(Location::new(0, ChunkNo(n), 100));
            let extents = vec![GroupExtent { block: BlockNo(0), blocks: 512, to }];
            maps.apply_group(&GroupUpdate { last: Seq(n), extents, touched: vec![] });
            write(n + 1);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(reader.join().unwrap() > 0);
    });
}

#[test]
fn pieces_merge_only_where_they_are_contiguous() {
    let at = |chunk, index| Location::new(0, ChunkNo(chunk), index);
    let extent = |block, blocks, to| GroupExtent { block: BlockNo(block), blocks, to: Some(to) };
    let maps = Maps::new(4 * LEAF_SECTORS);
    let extents = vec![
        extent(510, 4, at(1, 10)),
        extent(514, 1, at(1, 20)),
        extent(515, 1, at(2, 21)),
        extent(516, 1, at(2, 22).damaged()),
        extent(517, 1, at(2, 23).damaged()),
    ];
    maps.apply_group(&GroupUpdate { last: Seq(1), extents, touched: vec![] });
    let mut out = Vec::new();
    maps.lookup(Lba(510 * 8 + 3), 8 * 8, &NoPins, &mut out);
    let want = [
        (3, 29, Source::Chunk(at(1, 10))),
        (32, 8, Source::Chunk(at(1, 20))),
        (40, 8, Source::Chunk(at(2, 21))),
        (48, 16, Source::Damaged(at(2, 22).damaged())),
        (64, 3, Source::Zero),
    ];
    let want = want.map(|(lba, sectors, what)| Piece { lba: Lba(510 * 8 + lba), sectors, what });
    assert_eq!(out, want);
}

#[test]
fn the_overlay_drops_through_a_seq() {
    let mut m = Model::new();
    m.entry(5, 5000, false);
    m.entry(0, SECTORS, true);
    m.entry(100, 7, false);
    m.maps.drop_overlay_through(Seq(1));
    m.check(0, 300);
    m.maps.drop_overlay_through(Seq(2));
    m.check(0, 300);
    assert_eq!(m.maps.stats().overlay_extents, 1);
    assert!(m.maps.overlay_covers(Lba(100), 7) && !m.maps.overlay_covers(Lba(99), 2));
}

#[test]
fn a_grown_volume_takes_the_smaller_image() {
    let mut img = BaseImage::empty(1000);
    img.apply_runs(&[Run { block: BlockNo(990), blocks: 10, to: Some(Location::new(0, ChunkNo(1), 0)) }]);
    let maps = Maps::new(64 << 21);
    maps.load_base(&img);
    assert_eq!(maps.base_lookup(BlockNo(999)), BaseState::At(Location::new(0, ChunkNo(1), 9)));
    let g = GroupExtent { block: BlockNo((64 << 18) - 1), blocks: 1, to: Some(Location::new(0, ChunkNo(2), 0)) };
    maps.apply_group(&GroupUpdate { last: Seq(1), extents: vec![g], touched: vec![] });
    assert_eq!(maps.stats().mapped_blocks, 11);
}

#[test]
#[should_panic(expected = "inside the volume")]
fn a_lookup_past_the_volume_is_a_fault() {
    Maps::new(SECTORS).lookup(Lba(SECTORS - 1), 2, &NoPins, &mut Vec::new());
}

/// Full random leaves: the most that a block can cost.
#[test]
fn the_bound_holds_for_random_leaves() {
    let mut x = 1u64;
    let mut draw = move |n: u64| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) % n
    };
    let blocks = 4096 * 512;
    for density in [1, 3, 50, 512] {
        let mut img = BaseImage::empty(blocks);
        for l in 0..4096 {
            let ops: Vec<_> = (0..512)
                .filter(|_| draw(512) < density)
                .collect::<Vec<_>>()
                .into_iter()
                .map(|i| (i, 1, Location::new(0, ChunkNo(1 + draw(1 << 20)), draw(1016) as u16).raw()))
                .collect();
            img.set_leaf(l, Leaf::Empty.update(ops.into_iter()));
        }
        let maps = Maps::new(blocks * 8);
        maps.load_base(&img);
        let s = maps.stats();
        check_bound(&img, &s);
        let touched = s.leaves.run + s.leaves.pair + s.leaves.runs + s.leaves.table;
        assert!(s.base_bytes <= 8 * s.mapped_blocks + 58 * touched.max(4096), "{density}: {s:?}");
        if density == 512 {
            assert!(s.base_bytes * 2 <= s.mapped_blocks * 17, "8.5 bytes for each block: {s:?}");
        }
    }
}
