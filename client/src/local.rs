//! Paging for this process alone, asked for in the words that Windows has too.

use crate::error::Error;
use crate::options::{LocalOptions, PrivateOptions};
use crate::pager::Pager;

impl Pager {
    /// Pages for this process alone: by a private daemon, whose swap file is in the directory of the one named.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a swap file that is to be kept; otherwise as [`Pager::private`].
    pub fn local(options: &LocalOptions) -> Result<Self, Error> {
        if options.keep {
            return Err(Error::Unsupported {
                what: "a swap file that is kept: it has no name here".to_owned(),
            });
        }
        let mut private = PrivateOptions::new(options.budget);
        private.swap_size = Some(options.swap_size);
        private.swap_dir = options.swap_file.as_deref().and_then(|file| file.parent()).map(|directory| {
            let here = directory.as_os_str().is_empty();
            if here { std::path::PathBuf::from(".") } else { directory.to_owned() }
        });
        Self::private(&private)
    }
}
