//! Users and groups by name, from the text of a container's own /etc/passwd and /etc/group. Pure.

/// As whom a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Groups of which the user is a member by /etc/group.
    pub(crate) groups: Vec<u32>,
}

/// A name that cannot be resolved; in the words of containerd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserError {
    #[error("unable to find user {0}: no matching entries in passwd file")]
    User(String),
    #[error("unable to find group {0}: no matching entries in group file")]
    Group(String),
    #[error("{0:?} is not of the form USER[:GROUP]")]
    Form(String),
}

/// A line of a passwd file, as far as it is of use.
struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// The lines that make sense; a broken one is skipped, as the C library does.
fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(User { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

/// The groups: name, number, and the members' names separated by commas.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// The number that a text is, if it is one that the kernel takes for a user or group.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

/// Resolves `USER[:GROUP]`, each a name or a number. A name must exist, a number need not; a name
/// that looks like a number is a name if the file has it.
///
/// # Errors
/// [`UserError`].
pub(crate) fn resolve(text: &str, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (user_text, group_text) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    if user_text.is_empty() || group_text.is_some_and(|g| g.is_empty() || g.contains(':')) {
        return Err(UserError::Form(text.to_owned()));
    }
    let wanted = number(user_text);
    let user = users(passwd)
        .find(|user| user.name == user_text)
        .or_else(|| users(passwd).find(|user| Some(user.uid) == wanted));
    let (uid, primary) = match (&user, wanted) {
        (Some(user), _) => (user.uid, user.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(UserError::User(user_text.to_owned())),
    };
    let gid = match group_text {
        None => primary,
        Some(name) => groups(group)
            .find(|(n, ..)| *n == name)
            .map(|(_, gid, _)| gid)
            .or_else(|| number(name))
            .ok_or_else(|| UserError::Group(name.to_owned()))?,
    };
    let name = user.map(|user| user.name);
    let member = |members: &str| name.is_some_and(|name| members.split(',').any(|m| m == name));
    let mut memberships = Vec::new();
    for (_, gid, members) in groups(group) {
        if member(members) && !memberships.contains(&gid) {
            memberships.push(gid);
        }
    }
    Ok(Identity { uid, gid, groups: memberships })
}

/// The home directory of a user.
pub(crate) fn home(passwd: &str, uid: u32) -> Option<&str> {
    users(passwd).find(|user| user.uid == uid).map(|user| user.home).filter(|h| !h.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:w,e:/var/www:\n\
                          1000:x:7:8::/:\nnohome:x:9:9:::\n";
    const GROUP: &str =
        "root:x:0:\nbroken\nwww:x:34:\nadm:x:4:web,other\nlog:x:5:web\nadm2:x:4:web\n";

    fn resolved(text: &str) -> (u32, u32, Vec<u32>) {
        let Identity { uid, gid, groups } = resolve(text, PASSWD, GROUP).unwrap();
        (uid, gid, groups)
    }

    #[test]
    fn names_and_numbers_are_resolved_with_their_groups() {
        assert_eq!(resolved("web"), (33, 34, vec![4, 5]));
        assert_eq!(resolved("33"), (33, 34, vec![4, 5]));
        assert_eq!(resolved("web:adm"), (33, 4, vec![4, 5]));
        assert_eq!(resolved("web:77"), (33, 77, vec![4, 5]));
        assert_eq!(resolved("4711"), (4711, 0, vec![]));
        assert_eq!(resolved("4711:www"), (4711, 34, vec![]));
        assert_eq!(resolved("1000"), (7, 8, vec![]), "a name that looks like a number");
    }

    #[test]
    fn names_that_do_not_exist_are_errors() {
        let error = |text: &str| resolve(text, PASSWD, GROUP).unwrap_err().to_string();
        assert_eq!(
            error("nobody"),
            "unable to find user nobody: no matching entries in passwd file"
        );
        assert_eq!(
            error("web:none"),
            "unable to find group none: no matching entries in group file"
        );
        for text in ["", ":", "web:", ":www", "a:b:c"] {
            assert!(error(text).contains("USER[:GROUP]"), "{text:?}");
        }
        assert!(error("4294967295").contains("unable to find user"), "the kernel's `unchanged`");
    }

    #[test]
    fn the_home_directory_comes_from_the_line_of_the_user() {
        assert_eq!(home(PASSWD, 0), Some("/root"));
        assert_eq!(home(PASSWD, 33), Some("/var/www"));
        assert_eq!(home(PASSWD, 9), None);
        assert_eq!(home(PASSWD, 1), None);
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(
            passwd in "[a-z0-9:,\n]{0,99}", group in "[a-z0-9:,\n]{0,99}", text in "[a-z0-9:]{0,9}",
        ) {
            if let Ok(identity) = resolve(&text, &passwd, &group) {
                prop_assert!(!text.is_empty());
                prop_assert_eq!(home(&passwd, identity.uid), home(&passwd, identity.uid));
            }
        }
    }
}
