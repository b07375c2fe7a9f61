//! What the guest's CPU can do, as QEMU gave it: a guest that has seen a feature cannot go on where it
//! is missing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::qmp::{Qmp, QmpError};

/// Names of features that are missed most often: CPUID word, bit, name.
const NAMES: [(&str, u32, &str); 14] = [
    ("1.0.ECX", 9, "ssse3"),
    ("1.0.ECX", 20, "sse4.2"),
    ("1.0.ECX", 23, "popcnt"),
    ("1.0.ECX", 25, "aes"),
    ("1.0.ECX", 26, "xsave"),
    ("1.0.ECX", 28, "avx"),
    ("1.0.ECX", 30, "rdrand"),
    ("7.0.EBX", 3, "bmi1"),
    ("7.0.EBX", 5, "avx2"),
    ("7.0.EBX", 16, "avx512f"),
    ("7.0.EBX", 29, "sha"),
    ("7.0.ECX", 3, "pku"),
    ("7.0.EDX", 22, "amx-bf16"),
    ("80000001.0.ECX", 6, "sse4a"),
];

/// The virtual CPUs of a guest, which are all alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// How many there are.
    pub count: u32,
    /// Vendor that it shows to the guest.
    pub vendor: String,
    /// Feature bits of the CPUID words that are not zero. A word is named by leaf, subleaf and
    /// register: `7.0.EBX`.
    pub features: BTreeMap<String, u32>,
}

#[derive(Deserialize)]
struct Of {
    #[serde(rename = "qom-path")]
    path: String,
}

#[derive(Deserialize)]
struct Word {
    #[serde(rename = "cpuid-input-eax")]
    leaf: u32,
    #[serde(rename = "cpuid-input-ecx", default)]
    subleaf: u32,
    #[serde(rename = "cpuid-register")]
    register: String,
    features: u32,
}

/// Asks a QEMU. `None` where it does not say (not an x86).
pub async fn ask(qmp: &Qmp) -> Result<Option<Cpu>, QmpError> {
    let cpus: Vec<Of> = qmp.ask("query-cpus-fast").await?;
    let count = u32::try_from(cpus.len()).unwrap_or(u32::MAX);
    let Some(first) = cpus.into_iter().next() else {
        return Ok(None);
    };
    let property = |name: &str| json!({ "path": first.path, "property": name });
    let (words, vendor) = match (
        qmp.call("qom-get", property("feature-words")).await,
        qmp.call("qom-get", property("vendor")).await,
    ) {
        (Ok(words), Ok(vendor)) => (words, vendor),
        (Err(QmpError::Refused { .. }), _) | (_, Err(QmpError::Refused { .. })) => return Ok(None),
        (Err(other), _) | (_, Err(other)) => return Err(other),
    };
    let odd = |what: serde_json::Error| QmpError::Odd {
        command: "qom-get feature-words".into(),
        what: what.to_string(),
    };
    let words: Vec<Word> = serde_json::from_value(words).map_err(odd)?;
    let features = words
        .into_iter()
        .filter(|word| word.features != 0)
        .map(|word| {
            let name = format!("{:x}.{:x}.{}", word.leaf, word.subleaf, word.register);
            (name, word.features)
        });
    Ok(Some(Cpu {
        count,
        vendor: vendor.as_str().unwrap_or_default().to_owned(),
        features: features.collect(),
    }))
}

impl Cpu {
    /// What this one has and `there` has not, in words; `None` if a guest can go on there.
    pub fn missing_in(&self, there: &Cpu) -> Option<String> {
        if self.vendor != there.vendor {
            return Some(format!(
                "the guest's CPU is one of {:?}, and here it would be one of {:?}: start the guest with a CPU model that both hosts have",
                self.vendor, there.vendor
            ));
        }
        let missing: Vec<String> = self
            .features
            .iter()
            .flat_map(|(word, bits)| {
                let here = there.features.get(word).copied().unwrap_or(0);
                let missing = bits & !here;
                let bits = (0..u32::BITS).filter(move |bit| missing & (1 << bit) != 0);
                bits.map(move |bit| name(word, bit))
            })
            .collect();
        if missing.is_empty() {
            return None;
        }
        Some(format!(
            "the guest's CPU has features that it would not have here ({}): start the guest with a CPU model that both hosts have",
            missing.join(", ")
        ))
    }
}

fn name(word: &str, bit: u32) -> String {
    let known = NAMES.iter().find(|(w, b, _)| *w == word && *b == bit);
    match known {
        Some((.., name)) => (*name).to_owned(),
        None => format!("CPUID {word} bit {bit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_there_matters() {
        let cpu = |vendor: &str, words: &[(&str, u32)]| Cpu {
            count: 1,
            vendor: vendor.into(),
            features: words.iter().map(|(w, b)| ((*w).into(), *b)).collect(),
        };
        let guest = cpu("AuthenticAMD", &[("7.0.EBX", 1 << 5 | 1), ("d.1.EAX", 2)]);
        assert_eq!(guest.missing_in(&guest), None);
        let more = cpu(
            "AuthenticAMD",
            &[("7.0.EBX", !0), ("d.1.EAX", 6), ("1.0.EDX", 1)],
        );
        assert_eq!(guest.missing_in(&more), None);
        let less = cpu("AuthenticAMD", &[("7.0.EBX", 1)]);
        let text = guest.missing_in(&less).unwrap();
        assert!(text.contains("(avx2, CPUID d.1.EAX bit 1)"), "{text}");
        let other = cpu("GenuineIntel", &[("7.0.EBX", !0), ("d.1.EAX", 6)]);
        assert!(guest.missing_in(&other).unwrap().contains("GenuineIntel"));
    }
}
