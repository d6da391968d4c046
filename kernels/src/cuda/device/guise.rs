//! A card in the guise of another: kernels of cards that are not at hand run on the one that is.
//!
//! With `QUIRE_AS_CAPABILITY=8.0` an H100 takes the kernels that an A100 would, within the shared memory that an A100 has,
//! from PTX for Ampere that the driver translates. Their results are to be an A100's, their times are not. `10.0` and
//! `12.0` stand for cards after Hopper, which have no machine code here and run PTX for 9.0.

use super::DeviceInfo;
use crate::KernelError;

/// The environment's variable.
pub(super) const VARIABLE: &str = "QUIRE_AS_CAPABILITY";

/// What a card may seem to be.
struct Guise {
    capability: (i32, i32),
    /// The compute capability whose PTX it runs.
    code: (i32, i32),
    /// Bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications per compute
    /// capability).
    shared: u32,
}

const GUISES: [Guise; 5] = [
    Guise { capability: (8, 0), code: (8, 0), shared: 163 << 10 },
    // These take the machine code for 8.0, which a build has, and convert fp8 as it does.
    Guise { capability: (8, 6), code: (8, 0), shared: 99 << 10 },
    Guise { capability: (8, 9), code: (8, 0), shared: 99 << 10 },
    Guise { capability: (10, 0), code: (9, 0), shared: 227 << 10 },
    Guise { capability: (12, 0), code: (9, 0), shared: 99 << 10 },
];

/// Has the card seem what `wanted` says, such as "8.0", and returns the compute capability whose PTX its kernels are to be.
///
/// # Errors
/// [`KernelError::Device`] for what is no guise, or one whose PTX this card does not run.
pub(super) fn put_on(info: &mut DeviceInfo, wanted: &str) -> Result<(i32, i32), KernelError> {
    let name = |(major, minor): (i32, i32)| format!("{major}.{minor}");
    let known = GUISES.into_iter().find(|guise| name(guise.capability) == wanted);
    let Some(Guise { capability, code, shared }) = known else {
        let names = GUISES.map(|guise| name(guise.capability)).join(", ");
        return Err(KernelError::Device(format!("{VARIABLE} is {wanted:?}: choose one of {names}")));
    };
    if info.capability < code || info.shared_bytes_per_block < shared {
        return Err(KernelError::Device(format!(
            "{VARIABLE} is {wanted}: {}, of compute capability {}, cannot stand for such a card",
            info.name,
            name(info.capability)
        )));
    }
    // What is kept or recorded under the card's name is not the card's.
    info.name = format!("{} in the guise of compute capability {wanted}", info.name);
    info.capability = capability;
    info.shared_bytes_per_block = shared;
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h100() -> DeviceInfo {
        DeviceInfo {
            name: "H100".into(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_bytes_per_block: 227 << 10,
            memory: 80 << 30,
            uuid: "GPU-0".into(),
            peak_flops: Some(1),
            peak_bytes: 1,
        }
    }

    #[test]
    fn a_later_card_stands_for_earlier_ones() {
        let mut info = h100();
        assert_eq!(put_on(&mut info, "8.6").unwrap(), (8, 0));
        assert_eq!((info.capability, info.shared_bytes_per_block), ((8, 6), 99 << 10));
        assert_eq!(info.name, "H100 in the guise of compute capability 8.6");
        assert_eq!(put_on(&mut h100(), "10.0").unwrap(), (9, 0));
    }

    #[test]
    fn what_it_cannot_stand_for_is_refused() {
        let ampere = DeviceInfo { capability: (8, 0), shared_bytes_per_block: 163 << 10, ..h100() };
        let ada = DeviceInfo { capability: (8, 9), shared_bytes_per_block: 99 << 10, ..h100() };
        for (card, wanted) in [(&ampere, "10.0"), (&ada, "12.0"), (&ada, "8.0")] {
            let mut info = card.clone();
            let error = put_on(&mut info, wanted).unwrap_err().to_string();
            assert!(error.contains("cannot stand for such a card"), "{error}");
            assert_eq!(info, *card);
        }
        assert_eq!(put_on(&mut ampere.clone(), "8.9").unwrap(), (8, 0));
        for wanted in ["", "9.0", "8", "80", "8.0 "] {
            let error = put_on(&mut h100(), wanted).unwrap_err().to_string();
            assert!(error.contains("choose one of 8.0, 8.6, 8.9, 10.0, 12.0"), "{error}");
        }
    }
}
