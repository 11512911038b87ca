//! The image that a new one is to lie over, as its header names it.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use super::super::Format;
use super::check;
use crate::error::{Context, Error, ErrorKind, Result};

/// An image to lie over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Below {
    /// Its name, from the folder of the image that names it.
    pub name: String,
    /// Its format.
    pub format: Format,
}

impl Below {
    /// The image at `path`, for one that will be at `above`. It has to be of a disk of `size` bytes: of what is behind its end the one
    /// above says nothing. Its format is what its first bytes say, unless it is given; a block device is raw.
    ///
    /// # Errors
    /// `Usage` for what cannot lie below, or has another size; `Corrupt`, `Unsupported` for what it says of itself; the system's.
    pub fn find(path: &Path, format: Option<Format>, above: &Path, size: u64) -> Result<Self> {
        let what = format!("the backing file {}", path.display());
        let usage = |why: String| Err(Error::new(ErrorKind::Usage, why));
        // A link may lead elsewhere tomorrow.
        let real = path.canonicalize().context(|| format!("looking for {what}"))?;
        if above.canonicalize().is_ok_and(|a| a == real) {
            return usage(format!("{what} is the very file that is to be written: name another one"));
        }
        let kind = real.metadata().context(|| format!("looking at {what}"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return usage(format!(
                "{what} is neither a file nor a block device: name the image that the increment is to lie over"
            ));
        }
        let mut file = File::open(&real).context(|| format!("opening {what}"))?;
        let format = match format {
            Some(f) => f,
            None if kind.is_block_device() => Format::Raw,
            None => Format::of(&file, &what)?,
        };
        let has = match format {
            Format::Raw => file.seek(SeekFrom::End(0)).context(|| format!("finding the end of {what}"))?,
            Format::Qcow2 => check::check(&file, &what)?.size,
        };
        if has != size {
            return usage(format!(
                "{what} is a disk of {has} bytes, and the snapshot has {size}: name an image that was exported of that snapshot"
            ));
        }
        Ok(Self { name: name(&real, above)?, format })
    }
}

/// What to call `real` in an image at `above`: beside or below it by what leads there, so that both can be moved together.
fn name(real: &Path, above: &Path) -> Result<String> {
    let own = above.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = own.canonicalize().context(|| format!("looking for the folder {}", own.display()))?;
    let mut name = real.strip_prefix(&own).unwrap_or(real).to_owned();
    // QEMU takes what is before a colon for a protocol.
    if let Some(Component::Normal(first)) = name.components().next()
        && first.as_encoded_bytes().contains(&b':')
    {
        name = PathBuf::from(".").join(name);
    }
    match name.to_str().filter(|n| n.len() <= check::MAX_NAME) {
        Some(n) => Ok(n.to_owned()),
        None => {
            let why = format!(
                "the path {} of the backing file is longer than {} bytes, or no UTF-8: no qcow2 image can name it; move it beside the new one",
                name.display(),
                check::MAX_NAME
            );
            Err(Error::new(ErrorKind::Usage, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_from_the_new_image_s_folder() {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().canonicalize().expect("there");
        std::fs::create_dir(root.join("sub")).expect("mkdir");
        let from = |real: &str, above: &str| name(&root.join(real), &root.join(above)).expect(real);
        assert_eq!(from("full.qcow2", "inc.qcow2"), "full.qcow2");
        assert_eq!(from("sub/full.qcow2", "inc.qcow2"), "sub/full.qcow2");
        assert_eq!(from("full.qcow2", "sub/inc.qcow2"), root.join("full.qcow2").to_str().expect("text"));
        assert_eq!(from("12:30.raw", "inc.qcow2"), "./12:30.raw");
        let long = "x/".repeat(600);
        assert_eq!(name(&root.join(long), &root.join("inc")).expect_err("long").kind(), ErrorKind::Usage);
    }

    #[test]
    fn an_image_of_another_size_does_not_lie_below() {
        let dir = tempfile::tempdir().expect("a folder");
        let (raw, above) = (dir.path().join("full"), dir.path().join("inc"));
        std::fs::write(&raw, vec![0; 8192]).expect("write");
        let below = Below::find(&raw, None, &above, 8192).expect("as large");
        assert_eq!(below, Below { name: "full".to_owned(), format: Format::Raw });
        for (path, size) in [(&raw, 4096), (&raw, 12288), (&dir.path().to_owned(), 8192)] {
            assert_eq!(Below::find(path, None, &above, size).expect_err("no").kind(), ErrorKind::Usage, "{size}");
        }
        assert!(Below::find(&raw, None, &raw, 8192).expect_err("itself").to_string().contains("very file"));
        assert_eq!(Below::find(&above, None, &above, 8192).expect_err("none").kind(), ErrorKind::NotFound);
        // What a guest may have written into a raw disk is not believed when the user says what it is.
        std::fs::write(&raw, [&check::MAGIC[..], &[0; 8188]].concat()).expect("write");
        Below::find(&raw, None, &above, 8192).expect_err("no qcow2 image");
        assert_eq!(Below::find(&raw, Some(Format::Raw), &above, 8192).expect("raw").format, Format::Raw);
    }
}
