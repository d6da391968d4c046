//! A rank's part of a model whose layers are divided over several devices (tensor parallelism; Shoeybi et al. 2019,
//! Megatron-LM, §3): whole heads, and a share of the feed-forward layer's width.

use std::borrow::Cow;

use quire_kernels::{GeneratedMatrix, WeightFormat};

use crate::EngineError;
use crate::model::{HostMatrix, LayerWeight, ModelConfig, WeightRole, WeightSource};

/// Which part of a model a rank has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Number of the rank, from 0 on.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Shard = Shard { rank: 0, ranks: 1 };

    /// What the rank computes: a model with its share of heads and of the feed-forward width, as wide as the whole between
    /// layers.
    ///
    /// # Errors
    /// When the ranks cannot have equal shares.
    pub fn config(self, whole: &ModelConfig) -> Result<ModelConfig, EngineError> {
        let share = |what: &str, number: usize| match number.is_multiple_of(self.ranks) {
            true => Ok(number / self.ranks),
            false => Err(EngineError::Config(format!(
                "{} devices cannot have equal shares of this model's {number} {what}: choose a tensor_parallel that divides its {} \
                 heads, {} key/value heads and feed-forward width of {}",
                self.ranks, whole.heads, whole.kv_heads, whole.ffn
            ))),
        };
        Ok(ModelConfig {
            heads: share("heads", whole.heads)?,
            kv_heads: share("key/value heads", whole.kv_heads)?,
            ffn: share("feed-forward columns", whole.ffn)?,
            ..whole.clone()
        })
    }
}

/// How a tensor is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Division {
    /// Every rank has all of it.
    Whole,
    /// By its rows: outputs of the rank's own.
    Rows,
    /// By its columns: inputs of the rank's own, whose sums over the ranks are the output.
    Columns,
    /// The first rank has all of it and the others zeros: it is added to such sums once.
    First,
}

fn division(role: WeightRole) -> Division {
    use LayerWeight as W;
    let WeightRole::Layer(_, weight) = role else { return Division::Whole };
    match weight {
        W::AttentionNorm | W::FfnNorm | W::QueryNorm | W::KeyNorm => Division::Whole,
        W::Query | W::Key | W::Value | W::Gate | W::Up => Division::Rows,
        W::QueryBias | W::KeyBias | W::ValueBias => Division::Rows,
        W::Output | W::Down => Division::Columns,
        W::OutputBias => Division::First,
    }
}

/// A rank's part of the weights, in the shapes of [`Shard::config`].
pub(crate) struct ShardedWeights<'a> {
    pub(crate) whole: &'a dyn WeightSource,
    pub(crate) shard: Shard,
}

impl WeightSource for ShardedWeights<'_> {
    fn matrix(&self, role: WeightRole, rows: usize, cols: usize) -> Result<HostMatrix<'_>, EngineError> {
        let Shard { rank, ranks } = self.shard;
        match division(role) {
            Division::Whole | Division::First => self.whole.matrix(role, rows, cols),
            Division::Rows => {
                let whole = self.whole.matrix(role, rows * ranks, cols)?;
                let stride = row_bytes(whole.format, cols)?;
                let (from, len) = (rank * rows * stride, rows * stride);
                let bytes = match whole.bytes {
                    Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[from..from + len]),
                    Cow::Owned(bytes) => Cow::Owned(bytes[from..from + len].to_vec()),
                };
                Ok(HostMatrix { rows, bytes, ..whole })
            }
            Division::Columns => {
                let whole = self.whole.matrix(role, rows, cols * ranks)?;
                let (stride, len) = (row_bytes(whole.format, cols * ranks)?, row_bytes(whole.format, cols)?);
                let parts = whole.bytes.chunks_exact(stride).map(|row| &row[rank * len..][..len]);
                let bytes = parts.collect::<Vec<_>>().concat();
                Ok(HostMatrix { cols, bytes: bytes.into(), ..whole })
            }
        }
    }

    fn generated(&self, role: WeightRole, rows: usize, cols: usize) -> Option<GeneratedMatrix> {
        let Shard { rank, ranks } = self.shard;
        match division(role) {
            Division::Whole | Division::First => self.whole.generated(role, rows, cols),
            Division::Rows => {
                let whole = self.whole.generated(role, rows * ranks, cols)?;
                Some(GeneratedMatrix { rows, first_row: whole.first_row + rank * rows, ..whole })
            }
            Division::Columns => {
                let whole = self.whole.generated(role, rows, cols * ranks)?;
                let first_col = whole.first_col + rank * cols;
                first_col.is_multiple_of(4).then_some(GeneratedMatrix { cols, first_col, ..whole })
            }
        }
    }

    fn vector(&self, role: WeightRole, len: usize) -> Result<Vec<f32>, EngineError> {
        let Shard { rank, ranks } = self.shard;
        match division(role) {
            Division::First if rank > 0 => Ok(vec![0.0; len]),
            Division::Rows => {
                let whole = self.whole.vector(role, len * ranks)?;
                Ok(whole[rank * len..][..len].to_vec())
            }
            Division::Whole | Division::First | Division::Columns => self.whole.vector(role, len),
        }
    }
}

fn row_bytes(format: WeightFormat, cols: usize) -> Result<usize, EngineError> {
    format.row_bytes(cols).ok_or_else(|| {
        EngineError::Config(format!(
            "rows of {cols} columns are no whole blocks of {format:?}: choose fewer devices, or weights of another format"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dummy::{DummyShape, DummyWeights};
    use crate::model::WeightDtype;

    fn weights() -> DummyWeights {
        DummyWeights::new(1, WeightDtype::Bf16, 1)
    }

    #[test]
    fn parts_of_a_tensor_make_it_whole() {
        let (rows, cols) = (8, 64);
        for (weight, by_rows) in [(LayerWeight::Gate, true), (LayerWeight::Down, false)] {
            let role = WeightRole::Layer(0, weight);
            let source = weights();
            let whole = source.matrix(role, rows, cols).unwrap();
            let part = |rank| {
                let shard = ShardedWeights { whole: &source, shard: Shard { rank, ranks: 2 } };
                let [rows, cols] = if by_rows { [rows / 2, cols] } else { [rows, cols / 2] };
                let matrix = shard.matrix(role, rows, cols).unwrap();
                assert_eq!([matrix.rows, matrix.cols], [rows, cols]);
                let made = shard.generated(role, rows, cols).unwrap();
                let first = if by_rows { [rank * rows, 0] } else { [0, rank * cols] };
                assert_eq!([made.first_row, made.first_col], first);
                matrix.bytes.into_owned()
            };
            let (first, second) = (part(0), part(1));
            let together: Vec<u8> = match by_rows {
                true => [first, second].concat(),
                false => {
                    first.chunks(cols).zip(second.chunks(cols)).flat_map(|(a, b)| [a, b].concat()).collect()
                }
            };
            assert_eq!(together, whole.bytes.as_ref());
        }
    }

    #[test]
    fn biases_are_added_once() {
        let source = weights();
        let of = |rank, weight, len| {
            let shard = ShardedWeights { whole: &source, shard: Shard { rank, ranks: 2 } };
            shard.vector(WeightRole::Layer(0, weight), len).unwrap()
        };
        let whole = source.vector(WeightRole::Layer(0, LayerWeight::QueryBias), 8).unwrap();
        let halves = [of(0, LayerWeight::QueryBias, 4), of(1, LayerWeight::QueryBias, 4)];
        assert_eq!(halves.concat(), whole);
        let whole = source.vector(WeightRole::Layer(0, LayerWeight::OutputBias), 8).unwrap();
        assert_eq!(of(0, LayerWeight::OutputBias, 8), whole);
        assert_eq!(of(1, LayerWeight::OutputBias, 8), [0.0; 8]);
        assert_eq!(of(1, LayerWeight::AttentionNorm, 8), [1.0; 8]);
    }

    #[test]
    fn shares_must_be_equal() {
        let shape = DummyShape::Llama31_8b.config();
        let quarter = Shard { rank: 3, ranks: 4 }.config(&shape).unwrap();
        assert_eq!([quarter.heads, quarter.kv_heads, quarter.ffn, quarter.hidden], [8, 2, 3584, 4096]);
        assert_eq!(Shard::WHOLE.config(&shape).unwrap(), shape);
        let error = |ranks, shape: DummyShape| {
            Shard { rank: 0, ranks }.config(&shape.config()).unwrap_err().to_string()
        };
        assert!(error(16, DummyShape::Llama31_8b).contains("8 key/value heads"));
        assert!(error(2, DummyShape::Smollm2_135m).contains("9 heads"));
    }

    #[test]
    fn blocks_are_not_cut() {
        let source = DummyWeights::new(1, WeightDtype::Q4_0, 1);
        let shard = ShardedWeights { whole: &source, shard: Shard { rank: 1, ranks: 2 } };
        let role = WeightRole::Layer(0, LayerWeight::Down);
        assert_eq!(shard.matrix(role, 2, 32).unwrap().bytes.len(), 2 * 18);
        assert!(shard.matrix(role, 2, 16).unwrap_err().to_string().contains("whole blocks"));
    }
}
