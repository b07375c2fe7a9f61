//! Names and numbers that identify things: guests, sites, epochs, generations, journals.
//!
//! All are newtypes, so that an epoch cannot be passed where a generation is meant. Names are
//! checked when they are made, because they become file names, metric labels and certificate URIs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest guest or site name, in bytes. Names become file names and metric labels.
pub const NAME_BYTES_MAX: usize = 63;

/// A name that is not usable as a guest or site name, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} name {name:?} is not usable: use 1 to 63 characters of a-z, 0-9, '-', '_' and '.', \
     the first one a letter or digit"
)]
pub struct NameError {
    what: &'static str,
    name: String,
}

fn check_name(what: &'static str, name: &str) -> Result<(), NameError> {
    let bytes = name.as_bytes();
    let allowed =
        |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
    let first_ok = bytes
        .first()
        .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if first_ok && bytes.len() <= NAME_BYTES_MAX && bytes.iter().all(allowed) {
        return Ok(());
    }
    // A hostile name is quoted in the error; cut it so that it cannot flood a log.
    Err(NameError {
        what,
        name: name.chars().take(NAME_BYTES_MAX + 1).collect(),
    })
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                check_name($what, name)?;
                Ok(Self(name.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check_name($what, &name)?;
                Ok(Self(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name_type!(
    /// A protected guest. The same name at both sites means the same guest.
    GuestId,
    "guest"
);
name_type!(
    /// A site: one daemon, one host, one certificate.
    SiteId,
    "site"
);
name_type!(
    /// A disk of a guest, unique within it.
    DiskId,
    "disk"
);

name_type!(
    /// Guests that are cut at one instant.
    GroupId,
    "group"
);

name_type!(
    /// A plan, or a group of guests in it.
    PlanName,
    "plan or group"
);

/// Largest count that is believed when it comes from outside. From here 2^63 steps are left, so that
/// nobody can make us count to the end.
pub const COUNT_MAX: u64 = u64::MAX >> 1;

/// A count that no guest reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no count of checkpoints or owners: it is above 2^63")]
pub struct ImpossibleCount(pub u64);

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
        )]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name(pub u64);

        impl TryFrom<u64> for $name {
            type Error = ImpossibleCount;

            fn try_from(number: u64) -> Result<Self, ImpossibleCount> {
                if number > COUNT_MAX {
                    return Err(ImpossibleCount(number));
                }
                Ok(Self(number))
            }
        }

        impl From<$name> for u64 {
            fn from(number: $name) -> u64 {
                number.0
            }
        }

        impl $name {
            /// The number after this one. Panics after 2^64 steps, which no guest reaches.
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("a counter of checkpoints cannot reach 2^64"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number_type!(
    /// Number of a checkpoint of one guest. It grows over the guest's whole life, across
    /// generations; numbers of abandoned checkpoints are skipped, never used again.
    /// 0 means "no checkpoint yet".
    Epoch
);
number_type!(
    /// Number of a guest's current owner, raised durably at each promotion. Lower ones are refused
    /// everywhere. The first owner is generation 1.
    Generation
);

/// Most members of a group.
pub const GROUP_MEMBERS_MAX: u16 = 64;
/// Longest name of a group, in bytes: it is in the tag of a point.
pub const GROUP_NAME_BYTES_MAX: usize = 31;

/// One instant of a group: all points with the same mark show it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(GroupId, u64, u16)", into = "(GroupId, u64, u16)")]
pub struct GroupMark {
    /// The group.
    pub group: GroupId,
    /// Which instant: never the same for two of them.
    pub number: u64,
    /// So many guests have a point of it. Who lost the primary knows by this whether all are there.
    pub members: u16,
}

/// What cannot be a mark of a group, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("group {group}, number {number}, {members} members: this is no mark of a group's point")]
pub struct ImpossibleMark {
    group: GroupId,
    number: u64,
    members: u16,
}

impl TryFrom<(GroupId, u64, u16)> for GroupMark {
    type Error = ImpossibleMark;

    fn try_from((group, number, members): (GroupId, u64, u16)) -> Result<Self, ImpossibleMark> {
        let named = group.as_str().len() <= GROUP_NAME_BYTES_MAX;
        if !named || number > COUNT_MAX || !(2..=GROUP_MEMBERS_MAX).contains(&members) {
            return Err(ImpossibleMark {
                group,
                number,
                members,
            });
        }
        Ok(Self {
            group,
            number,
            members,
        })
    }
}

impl From<GroupMark> for (GroupId, u64, u16) {
    fn from(mark: GroupMark) -> Self {
        (mark.group, mark.number, mark.members)
    }
}

/// The tag of a point: `group/NAME/NUMBER/MEMBERS`.
impl fmt::Display for GroupMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group/{}/{}/{}", self.group, self.number, self.members)
    }
}

impl GroupMark {
    /// The mark that a tag is, if it is one.
    pub fn of_tag(tag: &str) -> Option<Self> {
        let mut fields = tag.strip_prefix("group/")?.split('/');
        let group: GroupId = fields.next()?.parse().ok()?;
        let (number, members) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let mark = Self::try_from((group, number, members)).ok()?;
        (fields.next().is_none() && mark.to_string() == tag).then_some(mark)
    }
}

/// Identity of one journal, made at random when it is created. A base that was recorded against
/// another journal is no base.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JournalId(pub [u8; 16]);

impl fmt::Display for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// blake3 of a guest's whole RAM image (all RAM regions, concatenated in layout order).
/// `b3sum` of a materialised image prints the same value.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRoot(pub [u8; 32]);

impl fmt::Display for ImageRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ImageRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            "UPPER",
            "a b",
            "ü",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<GuestId>().is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "db1", "web-1.prod_x", &"x".repeat(63)] {
            assert_eq!(good.parse::<GuestId>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn counts_from_outside_leave_room_to_count_on() {
        let parse = |text: &str| serde_json::from_str::<Epoch>(text);
        let most = parse(&COUNT_MAX.to_string()).unwrap();
        assert_eq!(most.next().0, COUNT_MAX + 1);
        for text in [(COUNT_MAX + 1).to_string(), u64::MAX.to_string()] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains("no count"), "{error}");
        }
        assert_eq!(serde_json::to_string(&Generation(7)).unwrap(), "7");
    }

    #[test]
    fn a_mark_of_a_group_is_the_tag_that_it_makes_and_no_other() {
        let name = "x".repeat(GROUP_NAME_BYTES_MAX);
        for group in ["shop", &name] {
            let mark = GroupMark::try_from((group.parse().unwrap(), 1_764_352_678_123_456, 64));
            let tag = mark.clone().unwrap().to_string();
            assert!(tag.len() <= 63, "{tag}");
            assert_eq!(GroupMark::of_tag(&tag), mark.ok());
        }
        for bad in [
            "group/shop/7",
            "group/shop/7/1",
            "group/shop/7/65",
            "group/shop/7/2/",
            "group/shop/07/2",
            "group/shop/+7/2",
            "group/shop/-7/2",
            "group//7/2",
            "group/SHOP/7/2",
            &format!("group/{name}x/7/2"),
            "group/shop/9223372036854775808/2",
            "application-consistent",
        ] {
            assert_eq!(GroupMark::of_tag(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_name_from_json_is_checked_too() {
        assert!(serde_json::from_str::<SiteId>("\"../x\"").is_err());
        assert_eq!(
            serde_json::from_str::<SiteId>("\"site-a\"")
                .unwrap()
                .as_str(),
            "site-a"
        );
    }
}
