//! Devices, as configurations name them: those of the server, and those of a model.
//!
//! Owns: the names and the keys. Does not know: whether the devices are there, or what fits on them.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};
use tale_models::Error;
use tale_models::device::{DeviceSpec, num_gpus};

/// One device, or all of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// By its own name.
    One(DeviceSpec),
    /// `cuda:*`: every GPU that the process may see.
    Gpus,
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        if name == "cuda:*" { Ok(Self::Gpus) } else { name.parse().map(Self::One) }
    }
}

/// The devices that are meant; the CPU where none is named.
pub(super) fn named(names: &[DeviceName]) -> Result<Vec<DeviceSpec>, Error> {
    let mut devices = Vec::with_capacity(names.len());
    for name in names {
        match name {
            DeviceName::One(device) => devices.push(*device),
            DeviceName::Gpus => match num_gpus()? {
                0 => return Err(Error::Device("cuda:*: there is no GPU".into())),
                count => devices.extend((0..count).map(DeviceSpec::Cuda)),
            },
        }
    }
    if devices.is_empty() {
        devices.push(DeviceSpec::default());
    }
    Ok(devices)
}

/// Where one model lies, as far as that is said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Whereabouts {
    /// Those that may hold it; empty where all may.
    pub devices: Vec<DeviceSpec>,
    /// How many do.
    pub replicas: Option<NonZeroUsize>,
    /// How many of them share it, in place of each having all of it.
    pub tensor_parallel: Option<NonZeroUsize>,
    /// How many of them predict guidance branches: two.
    pub guidance_devices: Option<NonZeroUsize>,
}

/// Takes the value of a key; false where it is none, or comes once too often.
type Take = fn(&mut Whereabouts, &str) -> bool;

impl Whereabouts {
    /// The keys on the command line, each with what takes its value.
    pub(super) const KEYS: [(&'static str, Take); 4] = [
        ("device", |whereabouts, device| device.parse().is_ok_and(|device| push(&mut whereabouts.devices, device))),
        ("replicas", |whereabouts, count| {
            count.parse().is_ok_and(|count| whereabouts.replicas.replace(count).is_none())
        }),
        ("tensor_parallel", |whereabouts, count| {
            count.parse().is_ok_and(|count| whereabouts.tensor_parallel.replace(count).is_none())
        }),
        ("guidance_devices", |whereabouts, count| {
            count.parse().is_ok_and(|count| whereabouts.guidance_devices.replace(count).is_none())
        }),
    ];
}

fn push(devices: &mut Vec<DeviceSpec>, device: DeviceSpec) -> bool {
    let is_new = !devices.contains(&device);
    devices.push(device);
    is_new
}

/// A name, or a list of them.
pub(super) fn one_or_more<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    struct Names;

    impl<'de> de::Visitor<'de> for Names {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the name of a device, or a list of names")
        }

        fn visit_str<E: de::Error>(self, name: &str) -> Result<Vec<String>, E> {
            Ok(vec![name.to_owned()])
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Vec<String>, A::Error> {
            Vec::deserialize(de::value::SeqAccessDeserializer::new(list))
        }
    }

    let names = deserializer.deserialize_any(Names)?;
    if names.is_empty() {
        return Err(de::Error::custom("the list is empty; name a device, or leave it out"));
    }
    names.iter().map(|name| name.parse().map_err(de::Error::custom)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_meant_where_nothing_is_said() {
        assert_eq!(named(&[]).unwrap(), [DeviceSpec::Cpu]);
        let names = ["cuda:1", "cuda:0"].map(|name| name.parse().unwrap());
        assert_eq!(named(&names).unwrap(), [DeviceSpec::Cuda(1), DeviceSpec::Cuda(0)]);
        assert_eq!("cuda:*".parse::<DeviceName>().unwrap(), DeviceName::Gpus);
        assert!("cpu:*".parse::<DeviceName>().is_err());
    }

    #[test]
    fn keys_of_a_model_are_taken_once() {
        let set = |key: &str, value: &str, whereabouts: &mut Whereabouts| {
            let (_, set) = Whereabouts::KEYS.iter().find(|(known, _)| *known == key).expect("a key");
            set(whereabouts, value)
        };
        let mut whereabouts = Whereabouts::default();
        assert!(set("device", "cuda:1", &mut whereabouts) && set("device", "cuda:2", &mut whereabouts));
        assert!(set("replicas", "1", &mut whereabouts) && set("tensor_parallel", "2", &mut whereabouts));
        assert_eq!(whereabouts.tensor_parallel, NonZeroUsize::new(2));
        let expected = (vec![DeviceSpec::Cuda(1), DeviceSpec::Cuda(2)], NonZeroUsize::new(1));
        assert_eq!((whereabouts.devices.clone(), whereabouts.replicas), expected);
        for (key, value) in
            [("device", "cuda:1"), ("device", "tpu"), ("replicas", "2"), ("replicas", "0"), ("tensor_parallel", "2")]
        {
            assert!(!set(key, value, &mut whereabouts), "{key}={value}");
        }
    }
}
