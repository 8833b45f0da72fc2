//! Tensors in and out of safetensors files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use nextscale::DType;
use nextscale::dtype::Element;
use safetensors::{Dtype, SafeTensors};

use crate::request::{Failure, Op};

/// The dtypes of both sides.
pub(crate) static DTYPES: &[(DType, Dtype)] = &[
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::F8E4M3, Dtype::F8_E4M3),
    (DType::I8, Dtype::I8),
    (DType::U8, Dtype::U8),
    (DType::U16, Dtype::U16),
    (DType::I32, Dtype::I32),
    (DType::U32, Dtype::U32),
    (DType::I64, Dtype::I64),
];

/// A contiguous tensor in host memory, little-endian as in the file.
#[derive(Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn new<T: Element>(shape: &[usize], elements: &[T]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), elements.len());
        Tensor { dtype: T::DTYPE, shape: shape.to_vec(), bytes: bytemuck::cast_slice(elements).to_vec() }
    }

    /// The elements, aligned for their type as those of a file need not be. `T` is the tensor's dtype.
    pub(crate) fn elements<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE);
        bytemuck::pod_collect_to_vec(&self.bytes)
    }
}

impl Tensor {
    /// The sizes of a tensor of `N` dimensions.
    pub(crate) fn shape_of<const N: usize>(&self, name: &str) -> Result<[usize; N], Failure> {
        let wrong = |_| Failure::request(format!("{name}: shape {:?} has not {N} dimensions", self.shape));
        self.shape.clone().try_into().map_err(wrong)
    }

    /// The elements of a tensor that has to have this dtype and shape.
    pub(crate) fn expect<T: Element>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>, Failure> {
        if self.dtype != T::DTYPE || self.shape != shape {
            let (have, want) = (self.dtype, T::DTYPE);
            return Err(Failure::request(format!("{name}: {have} {:?} instead of {want} {shape:?}", self.shape)));
        }
        Ok(self.elements())
    }
}

impl safetensors::View for &Tensor {
    fn dtype(&self) -> Dtype {
        let known = DTYPES.iter().find(|(ours, _)| *ours == self.dtype);
        known.expect("every dtype is in the table").1
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Tensors by name.
#[derive(Debug, Default)]
pub(crate) struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        let wrong = |why: String| Failure::Request(format!("{}: {why}", path.display()));
        let file = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
        let file = SafeTensors::deserialize(&file).map_err(|e| wrong(e.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let &(dtype, _) = DTYPES
                .iter()
                .find(|(_, theirs)| *theirs == view.dtype())
                .ok_or_else(|| wrong(format!("{name} has dtype {}, which no op takes", view.dtype())))?;
            tensors.insert(name, Tensor { dtype, shape: view.shape().to_vec(), bytes: view.data().to_vec() });
        }
        Ok(Tensors(tensors))
    }

    pub(crate) fn save(&self, path: &Path) -> Result<(), Failure> {
        let failed = |why: String| Failure::Failed(format!("{}: {why}", path.display()));
        let bytes = safetensors::serialize(&self.0, None).map_err(|e| failed(e.to_string()))?;
        std::fs::write(path, bytes).map_err(|e| failed(e.to_string()))
    }

    /// A tensor that the op does not read is a misspelt name.
    pub(crate) fn refuse_others(&self, op: &Op) -> Result<(), Failure> {
        match self.0.keys().find(|name| !op.inputs.iter().any(|input| input.name == name.as_str())) {
            Some(name) => Err(Failure::request(format!("{} reads no tensor {name:?}", op.name))),
            None => Ok(()),
        }
    }

    /// `None` if it is not there.
    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    pub(crate) fn require(&self, name: &str) -> Result<&Tensor, Failure> {
        self.get(name).ok_or_else(|| Failure::request(format!("the input tensor {name} is missing")))
    }

    pub(crate) fn with(mut self, name: &str, tensor: Tensor) -> Self {
        self.0.insert(name.to_owned(), tensor);
        self
    }

    /// The name of a tensor that differs in any bit.
    pub(crate) fn first_difference(&self, other: &Tensors) -> Option<&str> {
        self.0.iter().find(|(name, tensor)| other.0.get(*name) != Some(*tensor)).map(|(name, _)| name.as_str())
    }
}

/// `$body` with `$T` standing for the type of `$dtype`, if it is one of those listed.
macro_rules! with_type {
    ($name:expr, $dtype:expr, $T:ident in [$($type:ty),+], $body:expr) => {
        match $dtype {
            $(dtype if dtype == <$type as nextscale::dtype::Element>::DTYPE => {
                type $T = $type;
                $body
            })+
            dtype => {
                let offered = [$(<$type as nextscale::dtype::Element>::DTYPE.to_string()),+].join(", ");
                Err($crate::request::Failure::request(format!("{}: {dtype} is not one of {offered}", $name)))
            }
        }
    };
}
pub(crate) use with_type;
