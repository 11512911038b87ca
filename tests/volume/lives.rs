//! Whole lives of volumes, drawn at random: written, discarded, kept, cloned, flattened, resized, collected, deleted, let go of and taken up
//! again, in any order, by processes that may die. Each volume and each snapshot holds what its model says.
//!
//! `VB_LIVES=FROM..TO` runs other seeds.

use std::collections::BTreeMap;

use vb_ublk::error::ErrorKind;
use vb_ublk::manifest::Published;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::{Command, admin};

use super::gc::eager;
use super::snapshots::{clone, delete_snapshot, holds, is_well, snapshot};
use crate::support_rng::Rng;
use crate::volume_support::{Bench, block_on, churn, compare, drain, on_lane};

const MIB: usize = 1 << 20;
/// Volumes at once.
const MOST: usize = 5;

struct Life {
    model: Vec<u8>,
    host: Option<Host>,
    snapshots: BTreeMap<String, Vec<u8>>,
    /// The volume and the snapshot that it was cloned from, while it needs that.
    parent: Option<(String, String)>,
}

struct World {
    bench: Bench,
    rng: Rng,
    lives: BTreeMap<String, Life>,
    names: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let bench = Bench::new(4 * MIB);
        let life = Life { model: vec![0; 4 * MIB], host: None, snapshots: BTreeMap::new(), parent: None };
        Self { bench, rng: Rng(seed), lives: BTreeMap::from([("vol".to_owned(), life)]), names: 0 }
    }

    fn name(&mut self) -> String {
        self.names += 1;
        format!("n{}", self.names)
    }

    fn one_of<'a>(rng: &mut Rng, mut from: impl ExactSizeIterator<Item = &'a String>) -> Option<String> {
        let n = from.len() as u64;
        if n == 0 { None } else { from.nth(rng.below(n) as usize).cloned() }
    }

    fn attach(bench: &Bench, name: &str) -> Host {
        let log_path = bench.dir.path().join(format!("wal/{name}.wal"));
        Host::attach(AttachOptions { volume: name.to_owned(), log_path, gc: eager(), ..bench.options() }).unwrap()
    }

    /// Who was cloned from it and needs it.
    fn needed_by(&self, volume: &str, snapshot: Option<&str>) -> bool {
        self.lives
            .values()
            .any(|l| l.parent.as_ref().is_some_and(|p| p.0 == volume && snapshot.is_none_or(|s| p.1 == s)))
    }

    fn step(&mut self) {
        let Some(name) = Self::one_of(&mut self.rng, self.lives.keys()) else { return };
        let what = self.rng.below(16);
        let needed = self.needed_by(&name, None);
        let fresh = self.name();
        let (bench, rng) = (&self.bench, &mut self.rng);
        let count = self.lives.len();
        let life = self.lives.get_mut(&name).unwrap();
        match (what, &life.host) {
            (0..=4, None) => life.host = Some(Self::attach(bench, &name)),
            (0..=4, Some(host)) => {
                let model = &mut life.model;
                on_lane(host.volume(), async |e| churn(&e, model, rng, 40).await);
            }
            (5, Some(_)) => life.host.take().unwrap().detach().unwrap(),
            // The process dies: all that had completed is there.
            (6, Some(_)) => life.host.take().unwrap().abandon().unwrap(),
            (7, Some(host)) => {
                drain(host.volume());
                block_on(host.volume().command(Command::CollectGarbage)).unwrap();
            }
            (8, Some(host)) => {
                snapshot(host.volume(), &fresh).unwrap();
                life.snapshots.insert(fresh, life.model.clone());
            }
            (9, _) => {
                let Some(s) = Self::one_of(rng, life.snapshots.keys()) else { return };
                let deleted = match &life.host {
                    Some(host) => {
                        block_on(host.volume().command(|reply| Command::DeleteSnapshot { name: s.clone(), reply }))
                    }
                    None => delete_snapshot(bench, &name, &s),
                };
                match deleted {
                    Ok(()) => {
                        life.snapshots.remove(&s);
                        assert!(!self.needed_by(&name, Some(&s)), "{name}@{s} was needed");
                    }
                    // By its clones; or the volume was left by a process that died.
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Busy, "{e}"),
                }
            }
            (10 | 11, _) if count < MOST => {
                let Some(s) = Self::one_of(rng, life.snapshots.keys()) else { return };
                clone(bench, (&name, &s), &fresh, None).unwrap();
                let model = life.snapshots[&s].clone();
                let parent = Some((name, s));
                self.lives.insert(fresh, Life { model, host: None, snapshots: BTreeMap::new(), parent });
            }
            (12, Some(host)) => {
                let size = (life.model.len() + MIB) as u64;
                if size <= 8 * MIB as u64 {
                    block_on(host.volume().command(|reply| Command::Grow { size_bytes: size, reply })).unwrap();
                    life.model.resize(size as usize, 0);
                }
            }
            (13, Some(host)) => match block_on(host.volume().command(Command::Flatten)) {
                Ok(()) => life.parent = None,
                Err(e) => assert!(
                    e.kind() == ErrorKind::Busy && !life.snapshots.is_empty()
                        || e.kind() == ErrorKind::Usage && life.parent.is_none(),
                    "{e}"
                ),
            },
            (14, None) if count > 1 => match block_on(admin::delete(&*bench.store(), &name, true)) {
                Ok(_) => {
                    assert!(!needed, "{name} was needed");
                    self.lives.remove(&name);
                    let _ = std::fs::remove_file(self.bench.dir.path().join(format!("wal/{name}.wal")));
                }
                Err(e) => assert!(e.kind() == ErrorKind::Busy && needed, "{e}"),
            },
            (15, Some(host)) => {
                let model = &life.model;
                on_lane(host.volume(), async |e| compare(&e, model, &name).await);
            }
            _ => {}
        }
    }

    /// All of it, from the store alone.
    fn judge(mut self) {
        for (name, life) in &mut self.lives {
            // What a process that died has left is in the log.
            let host = life.host.take().unwrap_or_else(|| Self::attach(&self.bench, name));
            on_lane(host.volume(), async |e| compare(&e, &life.model, name).await);
            host.detach().unwrap();
        }
        self.bench.wipe_local();
        for (name, life) in &self.lives {
            holds(&self.bench, name, &life.model);
            is_well(&self.bench, name);
            for (s, model) in &life.snapshots {
                holds(&self.bench, &format!("{name}@{s}"), model);
            }
            let m = block_on(Published::load(&*self.bench.store(), name)).unwrap().manifest;
            assert_eq!(m.snapshots.len(), life.snapshots.len(), "{name}");
        }
        // From the youngest to the oldest nothing stands in the way; nothing is left.
        while !self.lives.is_empty() {
            let free = self.lives.keys().find(|n| !self.needed_by(n, None)).cloned().expect("no circle");
            block_on(admin::delete(&*self.bench.store(), &free, false)).unwrap();
            self.lives.remove(&free);
        }
        let left = block_on(self.bench.store().list("", None)).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn whatever_happens_each_volume_and_snapshot_holds_what_it_should() {
    let seeds = match std::env::var("VB_LIVES") {
        Ok(asked) => {
            let (from, to) = asked.split_once("..").expect("FROM..TO");
            from.parse().expect("a number")..to.parse().expect("a number")
        }
        Err(_) => 0..5,
    };
    for seed in seeds {
        let named = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..70 {
                world.step();
            }
            world.judge();
        });
        if let Err(e) = named {
            eprintln!("this was seed {seed}: VB_LIVES={seed}..{}", seed + 1);
            std::panic::resume_unwind(e);
        }
    }
}
