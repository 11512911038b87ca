//! Disk images: what a volume is imported from.

mod source;

pub use source::ImageSource;
