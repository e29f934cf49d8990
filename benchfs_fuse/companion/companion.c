/* Complete libfuse for a Python file system: what pyfuse3 leaves out, without touching pyfuse3.
 *
 * This library is loaded with RTLD_GLOBAL before pyfuse3. The dynamic linker then binds pyfuse3's calls of
 * fuse_session_new and fuse_session_receive_buf to the functions below, which do their part and call
 * libfuse's own (found by RTLD_NEXT). libfuse's calls of itself are not affected: only what pyfuse3 calls passes here.
 *
 *   fuse_session_new          adds the operations that pyfuse3 has no handlers for, and wraps init, where capabilities
 *                             and limits of the connection are settled
 *   fuse_session_receive_buf  reads without waiting: pyfuse3's loop waits for the kernel elsewhere, and would stand still;
 *                             notes, of the raw request that is about to be handled, what libfuse does not hand on;
 *                             answers at once what a hook can answer, and reads on: neither libfuse nor pyfuse3 see that
 *
 * An added operation calls a function of Python's (struct benchfs_hooks, filled in through ctypes), which answers with
 * libfuse's fuse_reply_* when it has the answer. Everything runs in the one thread of pyfuse3's loop, which holds the
 * GIL. The layout of the raw requests is the kernel's stable interface (linux/fuse.h).
 *
 * docs/companion.md says why this is sound, and which versions it was tried on.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 35

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <sys/file.h>
#include <sys/uio.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

/* What the connection shall be; set before the session is made. 0 leaves a number as libfuse has it. */
struct benchfs_wishes {
	uint32_t want;
	uint32_t unwanted;
	uint32_t max_background;
	uint32_t congestion_threshold;
	/* Nanoseconds to wait for the next request behind one that was answered at once. */
	uint64_t soon_ns;
};

/* What came of it; set when the kernel has said hello. */
struct benchfs_granted {
	uint32_t capable;
	uint32_t want;
	uint32_t proto_minor;
};

/* The request that was read last. flags: by opcode, see note(). received_ns: of CLOCK_MONOTONIC. turn: how often pyfuse3
 * has asked for a request, which it does once in each turn of its loop. */
struct benchfs_request {
	uint64_t unique;
	uint64_t lock_owner;
	uint64_t received_ns;
	uint32_t opcode;
	uint32_t flags;
	uint32_t pid;
	uint32_t uid;
	uint32_t gid;
	uint32_t umask;
	uint32_t turn;
};

/* Functions of Python's. A null hook leaves its operation out (ENOSYS: the kernel never asks again). */
struct benchfs_hooks {
	void (*fallocate)(fuse_req_t, uint64_t fh, int mode, int64_t offset, int64_t length);
	void (*lseek)(fuse_req_t, uint64_t fh, int64_t offset, int whence);
	void (*copy_file_range)(fuse_req_t, uint64_t fh, int64_t offset, uint64_t target_fh, int64_t target_offset,
				uint64_t length, int flags);
	void (*getlk)(fuse_req_t, uint64_t ino, uint64_t owner, int type, int64_t start, int64_t length);
	void (*setlk)(fuse_req_t, uint64_t ino, uint64_t fh, uint64_t owner, int flock, int type, int64_t start,
		      int64_t length, int pid, int wait, uint64_t unique);
	void (*setxattr)(fuse_req_t, uint64_t ino, const char *name, const char *value, uint64_t size, int flags,
			 uint32_t uid);
	void (*interrupt)(uint64_t unique);
	/* Answers at once: one more than the bytes of the answer that lie in benchfs_answer, -errno, or LEAVE. Who asks, and
	 * his umask, are in benchfs_request. */
	int (*lookup_now)(uint64_t parent, const char *name);
	int (*getattr_now)(uint64_t ino);
	int (*setattr_now)(uint64_t ino, const struct fuse_setattr_in *change);
	int (*mkdir_now)(uint64_t parent, const char *name, uint32_t mode);
	int (*unlink_now)(uint64_t parent, const char *name);
	int (*rmdir_now)(uint64_t parent, const char *name);
	int (*rename_now)(uint64_t parent, const char *name, uint64_t new_parent, const char *new_name, uint32_t flags);
	int (*open_now)(uint64_t ino, uint32_t flags);
	int (*create_now)(uint64_t parent, const char *name, uint32_t mode, uint32_t flags);
	int (*read_now)(uint64_t fh, uint64_t offset, uint32_t size);
	int (*write_now)(uint64_t fh, uint64_t offset, const void *data, uint32_t size);
	int (*flush_now)(uint64_t fh, uint64_t owner);
	int (*release_now)(uint64_t fh);
	int (*getxattr_now)(uint64_t ino, const char *name);
};

/* A hook leaves a request to libfuse. */
#define LEAVE 0
/* Nanoseconds in which requests are answered one after the other before the rest of the process has its turn. */
#define TURN_NS 1000000
/* Nanoseconds after which a look for the next request says that others need the processor more; times left out after
 * waits in vain. */
#define CONTENDED_NS 1000000
#define MISSED_MAX 15

/* Who sent the latest requests: the kernel numbers them in steps of 2. */
#define ASKED_MAX 8192
static struct {
	uint64_t unique;
	uint32_t pid;
} asked[ASKED_MAX];

/* SHA-256 of this file, as setup.py has seen it. */
PUBLIC const char benchfs_source[] = BENCHFS_SOURCE;

PUBLIC struct benchfs_wishes benchfs_wishes;
PUBLIC struct benchfs_granted benchfs_granted;
PUBLIC struct benchfs_request benchfs_request;
PUBLIC struct benchfs_hooks benchfs_hooks;
/* Requests that were read, and those of them that were answered at once. */
PUBLIC struct {
	uint64_t read;
	uint64_t at_once;
} benchfs_counts;

/* What hooks answer at once: this, and data behind it. */
PUBLIC char benchfs_answer[256];
PUBLIC struct {
	const void *at;
	uint64_t size;
} benchfs_data;
static struct fuse_lowlevel_ops completed;
static void (*wrapped_init)(void *, struct fuse_conn_info *);
static struct fuse_session *session;

static void complete_init(void *userdata, struct fuse_conn_info *conn)
{
	if (wrapped_init)
		wrapped_init(userdata, conn);
	conn->want |= benchfs_wishes.want & conn->capable;
	conn->want &= ~benchfs_wishes.unwanted;
	if (benchfs_wishes.max_background)
		conn->max_background = benchfs_wishes.max_background;
	if (benchfs_wishes.congestion_threshold)
		conn->congestion_threshold = benchfs_wishes.congestion_threshold;
	benchfs_granted.capable = conn->capable;
	benchfs_granted.want = conn->want;
	benchfs_granted.proto_minor = conn->proto_minor;
}

static void on_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
			 struct fuse_file_info *fi)
{
	(void)ino;
	benchfs_hooks.fallocate(req, fi->fh, mode, offset, length);
}

static void on_lseek(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, struct fuse_file_info *fi)
{
	(void)ino;
	benchfs_hooks.lseek(req, fi->fh, offset, whence);
}

static void on_copy_file_range(fuse_req_t req, fuse_ino_t ino, off_t offset, struct fuse_file_info *fi,
			       fuse_ino_t target_ino, off_t target_offset, struct fuse_file_info *target_fi,
			       size_t length, int flags)
{
	(void)ino;
	(void)target_ino;
	benchfs_hooks.copy_file_range(req, fi->fh, offset, target_fi->fh, target_offset, length, flags);
}

static void on_getlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock)
{
	benchfs_hooks.getlk(req, ino, fi->lock_owner, lock->l_type, lock->l_start, lock->l_len);
}

static void on_setlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock, int wait)
{
	benchfs_hooks.setlk(req, ino, fi->fh, fi->lock_owner, 0, lock->l_type, lock->l_start, lock->l_len,
			    lock->l_pid, wait, benchfs_request.unique);
}

static void on_flock(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, int op)
{
	int type = op & LOCK_EX ? F_WRLCK : op & LOCK_SH ? F_RDLCK : F_UNLCK;

	benchfs_hooks.setlk(req, ino, fi->fh, fi->lock_owner, 1, type, 0, 0, fuse_req_ctx(req)->pid,
			    !(op & LOCK_NB), benchfs_request.unique);
}

static void on_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
	benchfs_hooks.setxattr(req, ino, name, value, size, flags, fuse_req_ctx(req)->uid);
}

static void *libfuse(const char *name)
{
	return dlsym(RTLD_NEXT, name);
}

/* Make the table of operations that libfuse gets in place of pyfuse3's. */
static void complete(const struct fuse_lowlevel_ops *op, size_t op_size)
{
	memset(&completed, 0, sizeof completed);
	memcpy(&completed, op, op_size < sizeof completed ? op_size : sizeof completed);
	wrapped_init = completed.init;
	completed.init = complete_init;
	if (benchfs_hooks.fallocate)
		completed.fallocate = on_fallocate;
	if (benchfs_hooks.lseek)
		completed.lseek = on_lseek;
	if (benchfs_hooks.copy_file_range)
		completed.copy_file_range = on_copy_file_range;
	if (benchfs_hooks.getlk)
		completed.getlk = on_getlk;
	if (benchfs_hooks.setlk) {
		completed.setlk = on_setlk;
		completed.flock = on_flock;
	}
	if (benchfs_hooks.setxattr)
		completed.setxattr = on_setxattr;
}

#undef fuse_session_new /* libfuse 3.17 makes it a macro that calls the one below */
PUBLIC struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
					     size_t op_size, void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) =
		libfuse("fuse_session_new");

	complete(op, op_size);
	session = next(args, &completed, sizeof completed, userdata);
	return session;
}

/* What programs call that were built with libfuse 3.17 or newer; the version is theirs. */
struct libfuse_version;
PUBLIC struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
						       size_t op_size, struct libfuse_version *version,
						       void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
				     struct libfuse_version *, void *) = libfuse("fuse_session_new_versioned");

	complete(op, op_size);
	session = next(args, &completed, sizeof completed, version, userdata);
	return session;
}

/* The time of CLOCK_MONOTONIC. */
static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Note what a handler may want to know of its request: pyfuse3 starts the handler before the next one is read. */
static void note(const struct fuse_in_header *in, size_t size)
{
	const void *body = in + 1;
	size_t left = size - sizeof *in;

	benchfs_request.received_ns = now_ns();
	if (in->opcode != FUSE_INTERRUPT) { /* which is numbered like the request that it interrupts, but for a bit */
		asked[in->unique / 2 % ASKED_MAX].unique = in->unique;
		asked[in->unique / 2 % ASKED_MAX].pid = in->pid;
	}
	benchfs_request.pid = in->pid;
	benchfs_request.uid = in->uid;
	benchfs_request.gid = in->gid;
	benchfs_request.umask = 0;
	benchfs_request.unique = in->unique;
	benchfs_request.opcode = in->opcode;
	benchfs_request.flags = 0;
	benchfs_request.lock_owner = 0;
	if (in->opcode == FUSE_SETATTR && left >= sizeof(struct fuse_setattr_in)) {
		benchfs_request.flags = ((const struct fuse_setattr_in *)body)->valid;
	} else if (in->opcode == FUSE_WRITE && left >= sizeof(struct fuse_write_in)) {
		benchfs_request.flags = ((const struct fuse_write_in *)body)->write_flags;
	} else if (in->opcode == FUSE_FLUSH && left >= sizeof(struct fuse_flush_in)) {
		benchfs_request.lock_owner = ((const struct fuse_flush_in *)body)->lock_owner;
	} else if (in->opcode == FUSE_RELEASE && left >= sizeof(struct fuse_release_in)) {
		benchfs_request.flags = ((const struct fuse_release_in *)body)->release_flags;
		benchfs_request.lock_owner = ((const struct fuse_release_in *)body)->lock_owner;
	} else if (in->opcode == FUSE_INTERRUPT && left >= sizeof(struct fuse_interrupt_in)) {
		if (benchfs_hooks.interrupt)
			benchfs_hooks.interrupt(((const struct fuse_interrupt_in *)body)->unique);
	}
}

/* Return the string that a part of a request begins with, null if it does not end in there. */
static const char *name_in(const char *part, const char *end)
{
	return part < end && memchr(part, 0, end - part) ? part : NULL;
}

/* Have a hook rename what the two names in a part of a request say. */
static int answer_rename(uint64_t parent, const char *names, const char *end, uint64_t new_parent, uint32_t flags)
{
	const char *name = name_in(names, end), *new_name = name ? name_in(name + strlen(name) + 1, end) : NULL;

	return new_name && benchfs_hooks.rename_now ?
		       benchfs_hooks.rename_now(parent, name, new_parent, new_name, flags) :
		       LEAVE;
}

/* Have a hook answer a request; LEAVE if none does. */
static int answer_of(const struct fuse_in_header *in, size_t size)
{
	const struct benchfs_hooks *hooks = &benchfs_hooks;
	const char *body = (const char *)(in + 1), *end = (const char *)in + size, *name;

/* Let a variable be what a request begins with, behind the header, and `rest` what follows; or leave the request. */
#define ARGUMENT(type, variable) \
	const struct type *variable = (const void *)body; \
	const char *rest = body + sizeof *variable; \
	if (rest > end) \
		return LEAVE

	switch (in->opcode) {
	case FUSE_LOOKUP:
		name = name_in(body, end);
		return name && hooks->lookup_now ? hooks->lookup_now(in->nodeid, name) : LEAVE;
	case FUSE_UNLINK:
		name = name_in(body, end);
		return name && hooks->unlink_now ? hooks->unlink_now(in->nodeid, name) : LEAVE;
	case FUSE_RMDIR:
		name = name_in(body, end);
		return name && hooks->rmdir_now ? hooks->rmdir_now(in->nodeid, name) : LEAVE;
	case FUSE_GETATTR:
		return hooks->getattr_now ? hooks->getattr_now(in->nodeid) : LEAVE;
	case FUSE_SETATTR: {
		ARGUMENT(fuse_setattr_in, change);
		return hooks->setattr_now ? hooks->setattr_now(in->nodeid, change) : LEAVE;
	}
	case FUSE_GETXATTR: {
		ARGUMENT(fuse_getxattr_in, get);
		(void)get;
		name = name_in(rest, end);
		return name && hooks->getxattr_now ? hooks->getxattr_now(in->nodeid, name) : LEAVE;
	}
	case FUSE_OPEN: {
		ARGUMENT(fuse_open_in, open);
		return hooks->open_now ? hooks->open_now(in->nodeid, open->flags) : LEAVE;
	}
	case FUSE_CREATE: {
		ARGUMENT(fuse_create_in, create);
		benchfs_request.umask = create->umask;
		name = name_in(rest, end);
		return name && hooks->create_now ? hooks->create_now(in->nodeid, name, create->mode, create->flags) : LEAVE;
	}
	case FUSE_MKDIR: {
		ARGUMENT(fuse_mkdir_in, make);
		benchfs_request.umask = make->umask;
		name = name_in(rest, end);
		return name && hooks->mkdir_now ? hooks->mkdir_now(in->nodeid, name, make->mode) : LEAVE;
	}
	case FUSE_RENAME: {
		ARGUMENT(fuse_rename_in, rename);
		return answer_rename(in->nodeid, rest, end, rename->newdir, 0);
	}
	case FUSE_RENAME2: {
		ARGUMENT(fuse_rename2_in, rename);
		return answer_rename(in->nodeid, rest, end, rename->newdir, rename->flags);
	}
	case FUSE_READ: {
		ARGUMENT(fuse_read_in, read);
		return hooks->read_now ? hooks->read_now(read->fh, read->offset, read->size) : LEAVE;
	}
	case FUSE_WRITE: {
		ARGUMENT(fuse_write_in, write);
		return hooks->write_now && (size_t)(end - rest) == write->size ?
			       hooks->write_now(write->fh, write->offset, rest, write->size) :
			       LEAVE;
	}
	case FUSE_FLUSH: {
		ARGUMENT(fuse_flush_in, flush);
		return hooks->flush_now ? hooks->flush_now(flush->fh, flush->lock_owner) : LEAVE;
	}
	case FUSE_RELEASE: {
		ARGUMENT(fuse_release_in, release);
		return hooks->release_now ? hooks->release_now(release->fh) : LEAVE;
	}
	}
#undef ARGUMENT
	return LEAVE;
}

/* Give an answer to the kernel; return 0 or an errno. */
static int give(struct iovec *parts, int count)
{
	while (writev(fuse_session_fd(session), parts, count) < 0)
		if (errno != EINTR)
			return errno;
	return 0;
}

/* Answer a request as a hook says, with what it has left in benchfs_answer and benchfs_data. That nobody waits any more
 * (ENODEV: the file system has gone) is nobody's loss. Whoever would wait for an answer that the kernel does not take,
 * gets EIO. */
static void reply(uint64_t unique, int answer)
{
	struct fuse_out_header out = { .len = sizeof out, .unique = unique };
	struct iovec parts[3] = { { &out, sizeof out }, { benchfs_answer, 0 }, { NULL, 0 } };
	int error;

	if (answer > 1 + (int)sizeof benchfs_answer)
		answer = -EIO;
	if (answer < 0) {
		out.error = answer;
	} else {
		parts[1].iov_len = answer - 1;
		parts[2].iov_base = (void *)benchfs_data.at;
		parts[2].iov_len = benchfs_data.size;
		out.len += parts[1].iov_len + parts[2].iov_len;
	}
	error = give(parts, 3);
	if (error && error != ENOENT && error != ENODEV) {
		fprintf(stderr, "the kernel does not take an answer of %u bytes: %s\n", out.len, strerror(error));
		out.len = sizeof out;
		out.error = -EIO;
		give(parts, 1);
	}
}

/* Answer a request if that can be done at once; tell whether it was. */
static int answered(const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	int answer;

	if (buf->flags & FUSE_BUF_IS_FD || buf->size < sizeof *in)
		return 0;
	note(in, buf->size);
	benchfs_counts.read++;
	benchfs_data.size = 0;
	answer = answer_of(in, buf->size);
	if (answer == LEAVE)
		return 0;
	benchfs_counts.at_once++;
	reply(in->unique, answer);
	return 1;
}

/* Wait a little for the next request: whoever was answered often goes on with another one, and to sleep and be woken
 * takes longer than that. Where it was in vain, the next times are left out. */
static int read_soon(int (*next)(struct fuse_session *, struct fuse_buf *), struct fuse_session *se,
		     struct fuse_buf *buf)
{
	static int missed, left_out;
	uint64_t before, now = now_ns(), end = now + benchfs_wishes.soon_ns;
	int received = -EAGAIN;

	if (left_out < missed) {
		left_out++;
		return received;
	}
	do {
		before = now;
		sched_yield();
		received = next(se, buf);
		now = now_ns();
	} while (received == -EAGAIN && now < end && now - before < CONTENDED_NS);
	missed = received != -EAGAIN ? 0 : missed < MISSED_MAX ? 2 * missed + 1 : missed;
	left_out = 0;
	return received;
}

/* Read a request, if there still is one: the kernel takes back those of callers that are killed. A read that waited for
 * the next one would hold up all of pyfuse3's loop. -EINTR has the loop wait for the kernel again. */
PUBLIC int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	static int (*next)(struct fuse_session *, struct fuse_buf *);
	static struct fuse_session *prepared;
	uint64_t began;
	int received;

	if (!next)
		next = libfuse("fuse_session_receive_buf");
	if (prepared != se) {
		int fd = fuse_session_fd(se);

		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
		prepared = se;
	}
	benchfs_request.turn++;
	began = now_ns();
	received = next(se, buf);
	while (received > 0 && answered(buf)) {
		if (now_ns() - began > TURN_NS)
			return -EINTR;
		received = next(se, buf);
		if (received == -EAGAIN && benchfs_wishes.soon_ns)
			received = read_soon(next, se, buf);
	}
	return received == -EAGAIN ? -EINTR : received;
}

/* Return the thread that sent a request, 0 if that was forgotten. */
PUBLIC uint32_t benchfs_asked(uint64_t unique)
{
	return asked[unique / 2 % ASKED_MAX].unique == unique ? asked[unique / 2 % ASKED_MAX].pid : 0;
}

/* Free the caller of a request whose handler goes on: EINTR. The handler's own answer then finds no request and is
 * dropped (the kernel says ENOENT, which libfuse takes for an interrupted request). Returns 0 or an errno. */
PUBLIC int benchfs_free_caller(uint64_t unique)
{
	struct fuse_out_header out = { .len = sizeof out, .error = -EINTR, .unique = unique };

	return write(fuse_session_fd(session), &out, sizeof out) == sizeof out ? 0 : errno;
}

/* Have the kernel write back and forget its pages of a part of a file (length 0: to the end). Blocks until requests that
 * this takes are answered. Returns 0 or an errno. */
PUBLIC int benchfs_write_back(uint64_t ino, int64_t offset, int64_t length)
{
	return -fuse_lowlevel_notify_inval_inode(session, ino, offset, length);
}
