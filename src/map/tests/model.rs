//! The volume as it should be, and the maps beside it.

use super::*;

#[derive(Default)]
pub(super) struct Pins(pub(super) RefCell<Vec<LogBlock>>);

impl PinLog for Pins {
    fn pin(&self, blk: LogBlock) {
        self.0.borrow_mut().push(blk);
    }
}

pub(super) struct NoPins;

impl PinLog for NoPins {
    fn pin(&self, _: LogBlock) {}
}

/// The volume as it should be. A sector's content is a number, 0 for zeros.
pub(super) struct Model {
    pub(super) maps: Maps,
    pub(super) now: Vec<u64>,
    /// As of the last group.
    pub(super) packed: Vec<u64>,
    pub(super) log: HashMap<u32, [u64; 8]>,
    pub(super) chunks: HashMap<(u64, u16), [u64; 8]>,
    /// Entries after the last group.
    pub(super) entries: Vec<Entry>,
    pub(super) next_seq: u64,
    pub(super) next_blk: u32,
    pub(super) next_chunk: u64,
}

impl Model {
    pub(super) fn new() -> Self {
        Self {
            maps: Maps::new(SECTORS),
            now: vec![0; SECTORS as usize],
            packed: vec![0; SECTORS as usize],
            log: HashMap::new(),
            chunks: HashMap::new(),
            entries: Vec::new(),
            next_seq: 1,
            next_blk: 1,
            next_chunk: 1,
        }
    }

    pub(super) fn entry(&mut self, lba: u64, sectors: u64, hole: bool) {
        let seq = Seq(self.next_seq);
        self.next_seq += 1;
        let kind = if hole { EntryKind::Hole } else { EntryKind::Data(LogBlock(self.next_blk)) };
        for s in lba..lba + sectors {
            let id = if hole { 0 } else { seq.0 << 32 | s };
            self.now[s as usize] = id;
            if !hole {
                let blk = self.next_blk + (s / 8 - lba / 8) as u32;
                // Padding is nobody's content.
                self.log.entry(blk).or_insert([u64::MAX; 8])[(s % 8) as usize] = id;
            }
        }
        if !hole {
            self.next_blk += ((lba + sectors).div_ceil(8) - lba / 8) as u32;
        }
        let e = Entry { lba: Lba(lba), sectors, seq, kind };
        self.maps.apply_entry(&e);
        self.entries.push(e);
    }

    /// Packs the first `n` entries: what the group changes, the state after it, and nothing newer.
    pub(super) fn pack(&mut self, n: usize, chunk_blocks: u64, damage: bool) -> Option<GroupUpdate> {
        let group: Vec<Entry> = self.entries.drain(..n.min(self.entries.len())).collect();
        let last = group.last()?.seq;
        let mut touched = Vec::new();
        for e in &group {
            for s in e.lba.0..e.lba.0 + e.sectors {
                self.packed[s as usize] = if e.kind == EntryKind::Hole { 0 } else { e.seq.0 << 32 | s };
            }
            let first = e.lba.0 / 8;
            touched.push((BlockNo(first), (e.lba.0 + e.sectors).div_ceil(8) - first));
        }
        touched.sort();
        let mut extents: Vec<GroupExtent> = Vec::new();
        let mut index = 0;
        let mut next = 0;
        for &(first, n) in &touched {
            for b in first.0.max(next)..first.0 + n {
                let sectors: [u64; 8] =
                    std::array::from_fn(|i| self.packed.get(b as usize * 8 + i).copied().unwrap_or(0));
                let to = (sectors != [0; 8]).then(|| {
                    if index == chunk_blocks {
                        index = 0;
                        self.next_chunk += 1;
                    }
                    let at = Location::new(3, ChunkNo(self.next_chunk), index as u16);
                    self.chunks.insert((self.next_chunk, index as u16), sectors);
                    index += 1;
                    if damage && b % 5 == 0 { at.damaged() } else { at }
                });
                let goes_on = |e: &GroupExtent| {
                    e.block.0 + e.blocks == b
                        && match (e.to, to) {
                            (None, None) => true,
                            (Some(a), Some(t)) => a.leads_to(e.blocks, t),
                            _ => false,
                        }
                };
                match extents.last_mut() {
                    Some(e) if goes_on(e) => e.blocks += 1,
                    _ => extents.push(GroupExtent { block: BlockNo(b), blocks: 1, to }),
                }
            }
            next = next.max(first.0 + n);
        }
        self.next_chunk += 1;
        // The group's log room is recycled: what still points there has no content any more.
        let keep = self.entries.iter().find_map(|e| match e.kind {
            EntryKind::Data(b) => Some(b.0),
            EntryKind::Hole => None,
        });
        self.log.retain(|b, _| keep.is_some_and(|k| *b >= k));
        Some(GroupUpdate { last, extents, touched })
    }

    /// Looks a range up and follows every piece.
    pub(super) fn check(&self, lba: u64, sectors: u64) {
        let pins = Pins::default();
        let before = Piece { lba: Lba(lba), sectors: 0, what: Source::Zero };
        let mut out = vec![before];
        self.maps.lookup(Lba(lba), sectors, &pins, &mut out);
        assert_eq!(out.remove(0), before, "what was in the list stays");
        let mut at = lba;
        let mut logs = Vec::new();
        for p in &out {
            assert_eq!(p.lba.0, at, "pieces adjoin");
            assert!(p.sectors > 0);
            if let Source::Log { blk, .. } = p.what {
                logs.push(blk);
            }
            for s in at..at + u64::from(p.sectors) {
                let (nth, i) = (s / 8 - at / 8, (s % 8) as usize);
                let got = match p.what {
                    Source::Zero => 0,
                    Source::Log { blk, seq } => {
                        let id = self.log.get(&(blk.0 + nth as u32)).expect("the log block is still there")[i];
                        assert_eq!(id >> 32, seq.0);
                        id
                    }
                    Source::Chunk(l) | Source::Damaged(l) => {
                        assert_eq!(l.source(), 3);
                        let l = l.plus(nth as u16);
                        assert_eq!(l.is_damaged(), matches!(p.what, Source::Damaged(_)));
                        self.chunks[&(l.chunk().0, l.index())][i]
                    }
                };
                assert_eq!(got, self.now[s as usize], "sector {s} of {p:?}");
            }
            at += u64::from(p.sectors);
        }
        assert_eq!(at, lba + sectors, "the range is covered");
        assert_eq!(*pins.0.borrow(), logs, "each log piece is pinned once");
        assert!(!out.windows(2).any(|w| w[0].what == Source::Zero && w[1].what == Source::Zero), "zeros are merged");
    }

    /// The base against `packed`, and the totals against what is there.
    pub(super) fn check_totals(&self) {
        for b in (0..BLOCKS).step_by(7) {
            let mapped = self.maps.base_lookup(BlockNo(b)) != BaseState::Unmapped;
            let want = self.packed[b as usize * 8..].iter().take(8).any(|x| *x != 0);
            assert_eq!(mapped, want, "block {b}");
        }
        let img = self.maps.base_image();
        let stats = self.maps.stats();
        assert_eq!(stats.mapped_blocks, img.runs().map(|r| u64::from(r.blocks)).sum::<u64>());
        let (mut extents, mut forms) = (0, LeafForms::default());
        for s in self.maps.shards.iter() {
            let s = locked(s);
            let here: usize = s.overlay.values().map(|o| o.extents().len()).sum();
            assert_eq!(s.extents, here as u64);
            assert_eq!(s.heap_bytes, s.overlay.values().map(|o| o.heap_bytes() as u64).sum::<u64>());
            assert!(s.overlay.values().all(|o| !o.extents().is_empty()), "no empty leaf is kept");
            extents += s.extents;
        }
        assert_eq!(stats.overlay_extents, extents);
        for (_, leaf) in img.leaves(0..u64::MAX) {
            match leaf {
                Leaf::Empty => unreachable!(),
                Leaf::Run { .. } => forms.run += 1,
                Leaf::Pair { .. } => forms.pair += 1,
                Leaf::Runs(_) => forms.runs += 1,
                Leaf::Table(_) => forms.table += 1,
            }
        }
        assert_eq!(stats.leaves, forms);
        check_bound(&img, &stats);
    }

    /// The process dies and comes back: the log after the last group is replayed, the base comes at `when`.
    pub(super) fn reattach(&mut self, when: usize) {
        let img = recode(&self.maps.base_image(), 1 << 14);
        self.maps = Maps::new(SECTORS);
        let when = when % (self.entries.len() + 1);
        for (i, e) in self.entries.iter().enumerate() {
            if i == when {
                self.maps.load_base(&img);
            }
            self.maps.apply_entry(e);
        }
        if when == self.entries.len() {
            let covered: BTreeSet<u64> =
                self.entries.iter().flat_map(|e| e.lba.0..e.lba.0 + e.sectors).filter(|s| s % 61 == 0).collect();
            for s in (0..SECTORS).step_by(61) {
                assert_eq!(self.maps.overlay_covers(Lba(s), 1), covered.contains(&s), "sector {s}");
            }
            self.maps.load_base(&img);
        }
    }
}
