//! Pages, and how many have each.

/// The pages of a cache. The lowest free page is taken first, so that equal histories give equal places.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    owners: Vec<u32>,
    free: std::collections::BTreeSet<u32>,
}

impl Pool {
    pub(super) fn new(pages: usize) -> Self {
        Pool { owners: vec![0; pages], free: (0..pages as u32).collect() }
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// There must be one.
    pub(super) fn take(&mut self) -> u32 {
        let page = self.free.pop_first().expect("the caller has counted the free pages");
        self.owners[page as usize] = 1;
        page
    }

    pub(super) fn share(&mut self, page: u32) {
        self.owners[page as usize] += 1;
    }

    pub(super) fn shared(&self, page: u32) -> bool {
        self.owners[page as usize] > 1
    }

    pub(super) fn drop(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.insert(page);
        }
    }
}
