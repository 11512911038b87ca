//! Taking a volume on this host: one process at a time.

use super::serve;
use super::settings::Settings;
use super::state::{Held, RunDir, State};
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};

/// Takes the volume on this host, or says who has it.
pub(super) fn take(run: &RunDir, volume: &VolumeName) -> Result<Held> {
    let held = run.lock(volume)?;
    // A damaged state of nobody is simply replaced.
    let state = match run.read(volume) {
        Err(_) if held.is_some() => None,
        state => state?,
    };
    let Some(held) = held else {
        let what = match state {
            Some(State { pid, store, device: Some(n), .. }) => format!(
                "volume {volume} of {store} is attached already as /dev/ublkb{n} by process {pid}: use that, or detach it with \
                 `vb-ublk del -n {n}`"
            ),
            Some(state) if !state.nbd.is_empty() => format!(
                "volume {volume} of {} is served already over NBD at {} by process {}: use that, or detach it with {}",
                state.store,
                state.nbd.join(", "),
                state.pid,
                state.how_to_detach()
            ),
            Some(State { pid, .. }) => {
                format!("volume {volume} is just being attached or detached by process {pid}: see `vb-ublk list`")
            }
            None => format!("volume {volume} is just being attached by another process: see `vb-ublk list`"),
        };
        return Err(Error::new(ErrorKind::Busy, what));
    };
    if let Some(state) = state
        && let Some(n) = serve::device_left_by(&state)?.map(|d| d.id)
    {
        let what = format!(
            "volume {volume} was served as /dev/ublkb{n} by process {}, which died, and the device is still there: `vb-ublk recover -n {n}` \
             takes it up again (`vb-ublk del -n {n}` removes it); the log {} keeps what was written",
            state.pid,
            state.wal.display()
        );
        return Err(Error::new(ErrorKind::Busy, what));
    }
    Ok(held)
}

/// What a process of this host says of itself that has this very volume, of this store.
pub(super) fn attached_here(settings: &Settings, volume: &VolumeName) -> Result<Option<State>> {
    let run = RunDir::at(&settings.run_dir);
    if !run.is_held(volume)? {
        return Ok(None);
    }
    Ok(run.read(volume)?.filter(|state| state.store == settings.store.to_string()))
}

/// Refuses to take away what is a device of this host: a snapshot of the volume, or that very one. (An NBD server keeps what it served
/// for a while after its clients have gone.)
///
/// # Errors
/// `Busy` when one does.
pub(super) fn no_snapshot_served_here(settings: &Settings, volume: &VolumeName, snapshot: Option<&str>) -> Result<()> {
    let run = RunDir::at(&settings.run_dir);
    for (served, state) in run.all()? {
        let ((of, Some(name)), Ok(state)) = (served.parts(), state) else { continue };
        let concerned = of == volume.as_str() && snapshot.is_none_or(|s| s == name);
        let is_ours = state.device.is_some() && state.store == settings.store.to_string();
        if concerned && is_ours && run.is_held(&served)? {
            let what = format!(
                "{served} is served on this host, and reads what would be deleted: detach it first with {}",
                state.how_to_detach()
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_taken_once() {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(&dir.path().join("run")).expect("run");
        let v: VolumeName = "v".parse().expect("name");
        let held = take(&run, &v).expect("free");
        let e = take(&run, &v).expect_err("no state yet").to_string();
        assert!(e.contains("being attached by another"), "{e}");
        let mut state = State::new(v.clone(), "file:///s".into(), "/w".into(), None);
        run.write(&state).expect("write");
        let e = take(&run, &v).expect_err("attaching").to_string();
        assert!(e.contains(&format!("process {}", std::process::id())), "{e}");
        state.device = Some(4711);
        run.write(&state).expect("write");
        let e = take(&run, &v).expect_err("serving");
        assert_eq!(e.kind(), ErrorKind::Busy);
        assert!(e.to_string().contains("/dev/ublkb4711") && e.to_string().contains("del -n 4711"), "{e}");
        (state.device, state.nbd) = (None, vec!["nbd://127.0.0.1:10809/v".into()]);
        run.write(&state).expect("write");
        let e = take(&run, &v).expect_err("served over NBD").to_string();
        assert!(e.contains("nbd://127.0.0.1:10809/v") && e.contains(&format!("`kill {}`", state.pid)), "{e}");
        drop(held);
        // Dead, and its device is gone with it.
        take(&run, &v).expect("free again");
    }
}
