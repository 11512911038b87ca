//! What the maps cost: time of a lookup and of an update, bytes per mapped block.
//!
//! `cargo bench --bench maps` prints one line per case.

use std::hint::black_box;
use std::time::{Duration, Instant};

use vb_ublk::map::{
    BaseImage, Entry, EntryKind, GroupExtent, GroupUpdate, Location, LogBlock, Maps, PinLog, Run, checkpoint,
};
use vb_ublk::units::{BlockNo, ChunkNo, Lba, Seq};

struct NoPins;

impl PinLog for NoPins {
    fn pin(&self, blk: LogBlock) {
        black_box(blk);
    }
}

/// A small fixed generator: the figures are of the maps, the same in every run.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((u128::from(self.0) * u128::from(n)) >> 64) as u64
    }
}

const TIB_BLOCKS: u64 = 1 << 28;

fn ns(d: Duration, n: u64) -> f64 {
    d.as_nanos() as f64 / n as f64
}

fn report(name: &str, maps: &Maps) {
    let blocks = maps.volume_sectors() / 8;
    let mut rng = Rng(1);
    let mut out = Vec::with_capacity(64);
    let n = 2_000_000;
    // The same loop without the maps, to be taken off.
    let start = Instant::now();
    for _ in 0..n {
        black_box(rng.below(blocks));
    }
    let empty = start.elapsed();
    let start = Instant::now();
    for _ in 0..n {
        out.clear();
        maps.lookup(Lba(rng.below(blocks) * 8), 8, &NoPins, &mut out);
        black_box(&out);
    }
    let random = start.elapsed().saturating_sub(empty);
    let start = Instant::now();
    for i in 0..n {
        out.clear();
        maps.lookup(Lba(i % (blocks / 32) * 256), 256, &NoPins, &mut out);
        black_box(&out);
    }
    let sequential = start.elapsed();
    let start = Instant::now();
    let image = maps.base_image();
    let snap = start.elapsed();
    let start = Instant::now();
    let bytes: u64 = {
        let ident = checkpoint::Ident { volume: uuid::Uuid::nil(), number: 1 };
        checkpoint::encode_full(&image, ident, checkpoint::MAX_PART_BYTES).map(|p| p.len() as u64).sum()
    };
    let encode = start.elapsed();
    let s = maps.stats();
    println!(
        "{name}: lookup 4 KiB random {:.0} ns, 128 KiB sequential {:.0} ns; {} blocks, {:.1} MiB, {:.3} bytes per block; \
         image {snap:.2?}; checkpoint {:.1} MiB in {encode:.2?}; {:?}",
        ns(random, n),
        ns(sequential, n),
        s.mapped_blocks,
        s.base_bytes as f64 / f64::from(1 << 20),
        s.base_bytes as f64 / s.mapped_blocks.max(1) as f64,
        bytes as f64 / f64::from(1 << 20),
        s.leaves,
    );
}

fn loc(rng: &mut Rng) -> Location {
    Location::new(0, ChunkNo(1 + rng.below(1 << 20)), rng.below(1016) as u16)
}

fn sequential() -> Maps {
    let maps = Maps::new(TIB_BLOCKS * 8);
    let start = Instant::now();
    let (mut at, mut chunk) = (0, 1);
    while at < TIB_BLOCKS {
        let mut extents = Vec::new();
        for _ in 0..16 {
            let blocks = 1016.min(TIB_BLOCKS - at);
            if blocks > 0 {
                extents.push(GroupExtent { block: BlockNo(at), blocks, to: Some(Location::new(0, ChunkNo(chunk), 0)) });
            }
            at += blocks;
            chunk += 1;
        }
        maps.apply_group(&GroupUpdate { last: Seq(1), extents, touched: Vec::new() });
    }
    println!("sequential 1 TiB applied in {:.2?}", start.elapsed());
    maps
}

/// `n` draws of blocks of 1 TiB, in groups of 16 Ki blocks as a packer would make them.
fn random(n: u64) -> Maps {
    let maps = Maps::new(TIB_BLOCKS * 8);
    println!("random groups: {:.0} ns per block applied", ns(scatter(&maps, n, 1), n));
    maps
}

/// The same over what there is, in chunks from number `first` on. Returns the time that the map took.
fn scatter(maps: &Maps, n: u64, first: u64) -> Duration {
    let mut rng = Rng(7);
    let mut took = Duration::ZERO;
    for group in 0..n / 16384 {
        let mut blocks: Vec<u64> = (0..16384).map(|_| rng.below(TIB_BLOCKS)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let extents = blocks.iter().enumerate().map(|(i, &b)| {
            let at = Location::new(0, ChunkNo(first + group * 17 + i as u64 / 1016), (i % 1016) as u16);
            GroupExtent { block: BlockNo(b), blocks: 1, to: Some(at) }
        });
        let update = GroupUpdate { last: Seq(1), extents: extents.collect(), touched: Vec::new() };
        let start = Instant::now();
        maps.apply_group(&update);
        took += start.elapsed();
    }
    took
}

/// What `snapshot diff` and an increment ask for: the changes since an image, and the same where nothing is shared with it, as after
/// both were read from the store.
fn changes(maps: &Maps, what: &str, rewritten: u64) {
    let old = maps.base_image();
    scatter(maps, rewritten, 1 << 30);
    let new = maps.base_image();
    let start = Instant::now();
    let n = BaseImage::changes(&old, &new).count();
    let shared = start.elapsed();
    let mut read = BaseImage::empty(old.volume_blocks());
    read.apply_runs(&old.runs().collect::<Vec<_>>());
    let start = Instant::now();
    assert_eq!(BaseImage::changes(&read, &new).count(), n);
    println!("changes of {what}: {n} stretches in {shared:.2?}; with nothing shared {:.2?}", start.elapsed());
}

/// Every block of 64 GiB at a random place.
fn dense() -> Maps {
    let blocks = 1 << 24;
    let mut rng = Rng(3);
    let mut img = BaseImage::empty(blocks);
    for leaf in 0..blocks / 512 {
        let runs: Vec<Run> =
            (0..512).map(|i| Run { block: BlockNo(leaf * 512 + i), blocks: 1, to: Some(loc(&mut rng)) }).collect();
        img.apply_runs(&runs);
    }
    let maps = Maps::new(blocks * 8);
    maps.load_base(&img);
    maps
}

/// A log full of random 4 KiB writes: 1 GiB of it, over 64 GiB of volume.
fn overlay(maps: &Maps) {
    let mut rng = Rng(5);
    let n = 1 << 18;
    let start = Instant::now();
    for i in 0..n {
        let kind = EntryKind::Data(LogBlock(i as u32));
        maps.apply_entry(&Entry { lba: Lba(rng.below(1 << 24) * 8), sectors: 8, seq: Seq(i + 2), kind });
    }
    let took = start.elapsed();
    let s = maps.stats();
    println!(
        "overlay: {:.0} ns per random 4 KiB entry; {} extents, {:.1} bytes each",
        ns(took, n),
        s.overlay_extents,
        s.overlay_bytes as f64 / s.overlay_extents as f64
    );
}

fn discard(maps: &Maps, what: &str) {
    let start = Instant::now();
    let sectors = maps.volume_sectors();
    maps.apply_entry(&Entry { lba: Lba(0), sectors, seq: Seq(1 << 40), kind: EntryKind::Hole });
    let entry = start.elapsed();
    let start = Instant::now();
    let all = GroupExtent { block: BlockNo(0), blocks: sectors / 8, to: None };
    maps.apply_group(&GroupUpdate { last: Seq(1 << 40), extents: vec![all], touched: Vec::new() });
    println!("discard of {what}: entry {entry:.2?}, group {:.2?}", start.elapsed());
}

fn main() {
    let maps = sequential();
    report("sequential 1 TiB", &maps);
    changes(&maps, "1 TiB mapped sequentially, of which 1 M random blocks were rewritten", 1 << 20);
    discard(&maps, "1 TiB mapped sequentially");
    let maps = Maps::new(2 * TIB_BLOCKS * 8);
    discard(&maps, "2 TiB unmapped");
    let maps = random(10_000_000);
    report("10 M random blocks of 1 TiB", &maps);
    discard(&maps, "1 TiB with 10 M random blocks");
    let maps = dense();
    report("dense random 64 GiB", &maps);
    overlay(&maps);
    report("dense random 64 GiB under 256 Ki log entries", &maps);
}
