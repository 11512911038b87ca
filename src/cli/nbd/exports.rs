//! The volumes as exports: which names there are, and what they mean.

use std::rc::Rc;
use std::sync::Arc;

use super::super::engine::{self, LaneEngine};
use super::super::metrics::Figures;
use super::registry::{Lease, Registry};
use super::volumes::Volumes;
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};
use crate::frontend::nbd::{Export, ExportInfo, Exports};
use crate::lane::Lane;

/// What a server serves.
pub(super) struct Served {
    pub(super) registry: Registry<Volumes>,
    /// Empty: all of the store.
    pub(super) names: Vec<VolumeName>,
}

/// The volume that a client means, of those in `names`; when there are none, of any.
fn resolve(names: &[VolumeName], name: &str) -> Result<VolumeName> {
    let none = |why: &str| Error::new(ErrorKind::NotFound, why.to_owned());
    match (names, name) {
        ([only], "") => Ok(only.clone()),
        (_, "") => Err(none("there is no default export: name a volume")),
        _ => match name.parse::<VolumeName>() {
            Ok(volume) if names.is_empty() || names.contains(&volume) => Ok(volume),
            Ok(volume) => Err(none(&format!("volume {volume} is not served here"))),
            // Whatever a client sends, it is only not there.
            Err(e) => Err(none(&e.to_string())),
        },
    }
}

impl Served {
    /// What is told of the server and of all that is attached. `server` has its own figures, while it runs.
    pub(super) fn figures(&self, server: &super::volumes::Figures) -> Figures {
        let volumes = self.registry.all_attached();
        Figures {
            volumes: volumes.iter().map(|v| v.figures()).collect(),
            server: server.0.get().and_then(|figures| figures()),
        }
    }
}

impl Exports for Served {
    type Export = Lease<Volumes>;

    fn names(&self) -> Result<Vec<String>> {
        if !self.names.is_empty() {
            return Ok(self.names.iter().map(ToString::to_string).collect());
        }
        let volumes = self.registry.attacher();
        Ok(engine::list(&volumes.store, &volumes.store_options)?.volumes.into_iter().collect())
    }

    fn info(&self, name: &str) -> Result<ExportInfo> {
        let name = resolve(&self.names, name)?;
        match self.registry.attached(&name) {
            Some(volume) => Ok(volume.info()),
            None => self.registry.attacher().info(&name),
        }
    }

    fn open(&self, name: &str) -> Result<Arc<Lease<Volumes>>> {
        self.registry.open(&resolve(&self.names, name)?)
    }
}

impl Export for Lease<Volumes> {
    type Engine = LaneEngine;

    fn info(&self) -> ExportInfo {
        self.volume().info()
    }

    fn engine(&self, lane: &Lane) -> Result<Rc<LaneEngine>> {
        self.volume().engine(lane)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_clients_send() {
        let all = |s: &[&str]| s.iter().map(|n| n.parse().expect("name")).collect::<Vec<VolumeName>>();
        for (names, asked, meant) in [
            (&[][..], "v", Some("v")),
            (&[], "", None),
            (&["v"], "", Some("v")),
            (&["v"], "v", Some("v")),
            (&["v"], "w", None),
            (&["v", "w"], "w", Some("w")),
            (&["v", "w"], "", None),
        ] {
            let found = resolve(&all(names), asked);
            match meant {
                Some(meant) => assert_eq!(found.expect("there").as_str(), meant),
                None => assert_eq!(found.expect_err("none").kind(), ErrorKind::NotFound),
            }
        }
        for garbage in ["../v", "/", "a/b", ".", "\0", "\u{202e}", " v", &"x".repeat(4096)] {
            let e = resolve(&[], garbage).expect_err("garbage");
            assert!(e.kind() == ErrorKind::NotFound && e.to_string().len() < 800, "{e}");
        }
    }
}
