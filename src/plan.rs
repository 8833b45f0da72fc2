//! What all plans share.

/// The bytes that any kernel must move, however it cuts the work up: each element that is read once, and each that is
/// written once. Saturates. What an op leaves out is said at its `traffic`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Traffic {
    /// From all inputs.
    pub read: u64,
    /// To all outputs.
    pub written: u64,
}

/// Gives a typed plan `$Plan<T, ...> { inner, types }` the traits of its untyped `inner`: derives would ask them of the
/// element types, which have no `Eq` and `Hash`.
macro_rules! typed_plan {
    ($Plan:ident < $($T:ident),+ >) => {
        impl<$($T),+> Clone for $Plan<$($T),+> {
            fn clone(&self) -> Self {
                $Plan { inner: self.inner.clone(), types: ::core::marker::PhantomData }
            }
        }
        impl<$($T),+> PartialEq for $Plan<$($T),+> {
            fn eq(&self, other: &Self) -> bool {
                self.inner == other.inner
            }
        }
        impl<$($T),+> Eq for $Plan<$($T),+> {}
        impl<$($T),+> ::core::hash::Hash for $Plan<$($T),+> {
            fn hash<H: ::core::hash::Hasher>(&self, state: &mut H) {
                self.inner.hash(state);
            }
        }
        impl<$($T),+> ::core::fmt::Debug for $Plan<$($T),+> {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                self.inner.fmt(f)
            }
        }
    };
}
pub(crate) use typed_plan;
